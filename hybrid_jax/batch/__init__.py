"""The batch job: OpenAI batch lines in, answers out, through any interruption. Starts at `verb.py`."""
