"""The requests that `demo_corpus.py` puts to the sampled model: a seeded grid of form, subject, place, mood, opening.

Number n names one prompt for ever: the same n gives the same words. It does not know the model or its chat marks.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

ANIMALS = (
    "fox,hedgehog,old horse,young sparrow,snail,grey cat,shepherd dog,mouse,owl,bear cub,rabbit,wild goose,donkey,"
    "tortoise,otter,squirrel,crow,spider,bee,frog,deer,goat,lamb,little pig,whale,seal,crab,duckling,swan,wolf,"
    "badger,mole,bat,butterfly,ant,cricket,elephant,lion,monkey,camel,penguin,parrot,rooster,hen,stork,heron,"
    "beaver,lizard,turtle,firefly"
).split(",")
PEOPLE = (
    "baker,shoemaker,fisherman,gardener,miller,tailor,shepherd,clockmaker,lighthouse keeper,carpenter,postman,"
    "farmer,teacher,weaver,blacksmith,beekeeper,potter,sailor,painter,violin maker,librarian,grandmother,grandfather,"
    "boy,girl,young king,clever princess,woodcutter,innkeeper,ferryman,doctor,bookbinder,stonemason,train driver,"
    "musician,cook,toy maker,candle maker,little brother,older sister,traveller,map maker,astronomer,bell ringer,"
    "nurse,glassblower,chimney sweep,juggler,poet,merchant"
).split(",")
THINGS = (
    "a lost key,a broken clock,a wooden boat,a red kite,a silver coin,an old map,a loaf of bread,a woollen scarf,"
    "a paper lantern,a music box,a brass bell,a letter with no name,a small stone,a golden apple,a blue cup,"
    "a pair of boots,a seed,a fallen tree,a bridge,a well,a mirror,a drum,a ladder,a basket of eggs,a lamp,"
    "a feather,a rope,a book with empty pages,a garden gate,a kettle,a quilt,a jar of honey,a flute,a broken cart,"
    "a snow globe,a candle,a bicycle,a tiny house,a secret door,a wishing stone,a storm,the first snow,a long drought,"
    "a festival,a birthday,a race,a promise,a strange sound at night,an empty nest,a rainbow"
).split(",")
PLACES = (
    "in a small village by the sea,in a deep forest,on a mountain farm,in a busy market town,on a quiet island,"
    "by a wide river,in a snowy valley,in an old city,at the edge of a desert,in a garden behind a school,"
    "in a house on a hill,on a ship,in a windmill,beside a lake,in a meadow,in a castle,at a railway station,"
    "in an orchard,under an old oak tree,in a harbour,in a cave,on a long road,in a kitchen,in a workshop,"
    "in a library,in a barn,on a frozen pond,in a lighthouse,in a green valley,by a waterfall,in a cornfield,"
    "in a narrow street,on a beach,in the mountains,in a swamp,in a vineyard,in a little shop,in a park,at an inn,"
    "on a bridge"
).split(",")
MOODS = (
    "gentle,funny,sad but hopeful,exciting,calm,mysterious,warm,surprising,thoughtful,cheerful,brave,quiet,dreamy,"
    "playful,tender,wise,lively,peaceful,a little scary,joyful"
).split(",")
LESSONS = (
    "patience,honesty,sharing,courage,kindness,listening,hard work,friendship,pride,greed,forgiveness,trust,"
    "being careful,telling the truth,helping a stranger,keeping a promise,asking for help,being content,"
    "trying again,not judging too soon"
).split(",")
NAMES = (
    "Anna,Tom,Mira,Oscar,Lena,Sam,Rosa,Peter,Ida,Hugo,Nina,Max,Clara,Leo,Ella,Finn,Grace,Otto,Maya,Paul,Lucy,Ben,"
    "Alice,Jonas,Eva,Will,Ruth,Noah,Emma,Arthur,Sofia,Henry,Amina,Kenji,Priya,Mateo,Ling,Omar,Zara,Ivan,Freya,Tariq,"
    "Wanda,Joseph,Hana,Felix,Greta,Daniel,Olive,Simon"
).split(",")
SEASONS = (
    "in spring,in summer,in autumn,in winter,in the rainy season,early in the morning,late in the evening,at noon,"
    "at midnight,at harvest time,on market day,on the shortest day of the year"
).split(",")
CRAFTS = (
    "baking bread,making cheese,weaving a basket,knitting a scarf,building a stone wall,carving a spoon,making paper,"
    "binding a book,keeping bees,planting a garden,making candles,repairing a clock,sailing a small boat,"
    "painting a picture,making a clay pot,growing tomatoes,making soup,drying herbs,catching fish,mending a net,"
    "making a kite,playing the violin,reading a map,making jam,shearing sheep,blowing glass,folding paper,"
    "sharpening a knife,riding a horse,making shoes,laying bricks,sewing a shirt,printing a page,roasting coffee,"
    "brewing tea,pruning a tree,building a fire,making a chair,training a dog,taking a photograph"
).split(",")
WHYS = (
    "the sky is blue,leaves change colour in autumn,the moon seems to change its shape,ice floats on water,"
    "birds fly south in winter,the sea is salty,we have seasons,bees visit flowers,bread rises,cats purr,"
    "it rains,the wind blows,stars twinkle,we sleep,we dream,a rainbow appears,thunder follows lightning,"
    "wood burns,iron rusts,plants need light,fish can breathe under water,the tide comes and goes,"
    "a ship of steel can float,snow is white,a compass points north,spiders build webs,trees have rings,"
    "our hearts beat faster when we run,onions make us cry,we need water,the days are longer in summer,"
    "a ball falls to the ground,metal feels cold,soap cleans our hands,milk turns sour,a bell makes a sound,"
    "our shadows grow long in the evening,dew forms on the grass,seeds sprout,ducks do not get wet"
).split(",")
HOWS = (
    "a candle burns,a bicycle stays upright,a clock keeps time,a bird builds its nest,a seed becomes a tree,"
    "a river makes a valley,a volcano erupts,a bee makes honey,a cow makes milk,a caterpillar becomes a butterfly,"
    "a magnet works,a telescope works,a steam engine works,a windmill works,a kite flies,a whale breathes,"
    "a bat finds its way in the dark,glass is made,paper is made,salt is made,wool becomes cloth,a book is printed,"
    "a bridge carries weight,a lock works,a piano makes sound,a camera works,a letter travels to another country,"
    "clouds form,mountains form,coal was formed,the eye sees,the ear hears,the heart works,the lungs work,"
    "food is digested,a cut heals,muscles work,plants drink water,a desert plant lives without rain,"
    "a lighthouse helps ships"
).split(",")
TOPICS = (
    "the sun,the moon,the planet Mars,rivers,mountains,forests,deserts,the ocean,coral reefs,islands,volcanoes,"
    "glaciers,"
    "bridges,libraries,schools,music,paper,glass,bread,salt,tea,coffee,sugar,rice,potatoes,apples,wheat,cotton,silk,"
    "wool,gold,iron,water,air,fire,time,friendship,sleep,memory,laughter,trains,ships,bicycles,maps,clocks,letters,"
    "money,markets,farms,cities,villages,gardens,trees,flowers,insects,birds,fish,horses,dogs,cats,wolves,elephants,"
    "whales,bears,bees,ants,snow,rain,wind,clouds,the seasons,the stars,the human body,the heart,the brain,teeth,bones,"
    "numbers,the alphabet,writing,painting,theatre,dance,games,cooking,festivals,the wheel,the printing press,"
    "the telescope,electricity,light,sound,heat,magnets,gravity,weather,the Roman Empire,ancient Egypt,castles"
).split(",")
QUESTIONS = (
    "What should a child know about {topic}? Answer simply.|"
    "Tell me three interesting things about {topic}, in plain sentences.|"
    "Why do people care about {topic}?|Write a short paragraph about {topic} for a child.|"
    "What would the world be like without {topic}?|How did people long ago think about {topic}?|"
    "Describe {topic} to someone who has never heard of it.|What can we learn from {topic}?"
).split("|")
PROBLEMS = (
    "I cannot sleep,I am nervous before a test,I had a quarrel with my friend,I want to read more books,"
    "I am moving to a new town,I want to learn to cook,I lost something that I loved,I am bored on a rainy day,"
    "I want to save money,I am shy in a new class,my plants are dying,my dog is afraid of storms,I feel lonely,"
    "I want to get up earlier,I forget people's names,I want to learn a language,I have too much to do,"
    "I want to give my mother a present,my little brother does not share,I want to start a garden,"
    "I am afraid of the dark,I want to write a story,I made a mistake at work,I want to walk more,"
    "I am planning a picnic,I want to thank my teacher"
).split(",")
STORY_OPENINGS = (
    "Once upon a time,|Long ago,|One morning,|There was once|It was a cold night when|Nobody knew why|"
    "Every evening,|On the first day of spring,|When {name} was seven years old,|{name} had never|The old|"
    "In the middle of the night,|At the end of the road|{name} opened the door|The rain had just stopped when|"
    'Far away,|Before the sun came up,|"Wait!" said {name}.|"Where are you going?" asked {name}.|'
    "It all began with|For many years,|{name} and {other} were|One day in autumn,|The wind was strong|"
    "Everybody in the village knew {name}.|{name} was hungry.|It was the last day of|The little"
).split("|")


@dataclass(frozen=True)
class Prompt:
    """What is asked, and the first words of the answer, which the model goes on from (they may be empty)."""

    request: str
    opening: str


@dataclass(frozen=True)
class Draw:
    """One seeded choice from each list."""

    rng: random.Random

    def one(self, choices) -> str:
        return self.rng.choice(choices)


def with_article(noun: str) -> str:
    """A noun behind "a" or "an"."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def hero(draw: Draw) -> str:
    """Who a story is about."""
    return with_article(draw.one(draw.one((ANIMALS, PEOPLE))))


def opening(draw: Draw) -> str:
    """The first words of a story."""
    return draw.one(STORY_OPENINGS).format(name=draw.one(NAMES), other=draw.one(NAMES))


def story(draw: Draw) -> Prompt:
    """Ask for a short story."""
    mood, about, place = with_article(draw.one(MOODS)), hero(draw), draw.one(PLACES)
    request = draw.one(
        (
            f"Write {mood} story for children about {about} and {draw.one(THINGS)}. It takes place {place}.",
            f"Tell me {mood} short story about {about} who finds {draw.one(THINGS)} {place}.",
            f"Write a short story about {draw.one(NAMES)}, {about}, and {hero(draw)}. It happens {place}.",
            f"Write a bedtime story {place}. The story has {about}, {draw.one(THINGS)} and {draw.one(THINGS)}.",
        )
    )
    return Prompt(request, opening(draw))


def fable(draw: Draw) -> Prompt:
    """Ask for a fable with a moral."""
    one, two = draw.one(ANIMALS), draw.one(ANIMALS)
    request = f"Write a short fable about {with_article(one)} and {with_article(two)}. It teaches {draw.one(LESSONS)}."
    first = draw.one(("Once,", "One day,", f"A{with_article(one)[1:]}", f"The {one}", "Long ago,", "There once lived"))
    return Prompt(request, first)


def dialogue(draw: Draw) -> Prompt:
    """Ask for a talk between two."""
    name, other, about = draw.one(NAMES), draw.one(NAMES), draw.one(THINGS)
    request = f"Write a short scene in which {name} and {other} talk about {about}. They are {draw.one(PLACES)}."
    first = draw.one(('"', f"{name} looked", f"{name} and {other} sat", f'"{other},"', f"{other} smiled"))
    return Prompt(request, first)


def letter(draw: Draw) -> Prompt:
    """Ask for a letter from one to another."""
    name, other = draw.one(NAMES), draw.one(NAMES)
    request = (
        f"Write a short {draw.one(MOODS)} letter from {name} to {other} about {draw.one(THINGS)}. "
        f"{name} lives {draw.one(PLACES)}."
    )
    first = draw.one(("", "I", "Thank you", "How are", "You will", "It is"))
    return Prompt(request, f"Dear {other},\n\n{first}")


def diary(draw: Draw) -> Prompt:
    """Ask for a diary entry."""
    request = (
        f"Write a diary entry of {with_article(draw.one(PEOPLE))} {draw.one(PLACES)} {draw.one(SEASONS)}. "
        f"The day was {draw.one(MOODS)}, and there was {draw.one(THINGS)}."
    )
    first = draw.one(("Today", "This morning", "I woke", "It rained", "At last", "I have", "Dear diary,"))
    return Prompt(request, first)


def description(draw: Draw) -> Prompt:
    """Ask for a description of a thing, a place or a life."""
    request, first = draw.one(
        (
            (f"Describe what one sees and hears {draw.one(PLACES)} {draw.one(SEASONS)}. Use simple words.", ""),
            (f"Describe {hero(draw)} {draw.one(PLACES)} {draw.one(SEASONS)}, in one or two paragraphs.", "The"),
            (f"Describe the life of {with_article(draw.one(ANIMALS))} in simple words.", ""),
            (f"Describe a day in the life of {with_article(draw.one(PEOPLE))} {draw.one(PLACES)}.", ""),
            (f"Describe {draw.one(THINGS)} that {draw.one(NAMES)} found {draw.one(PLACES)}.", "It"),
        )
    )
    return Prompt(request, first)


def craft(draw: Draw) -> Prompt:
    """Ask about a craft."""
    doing, name = draw.one(CRAFTS), draw.one(NAMES)
    return Prompt(
        *draw.one(
            (
                (f"Explain {doing} to a beginner in a few plain sentences, with no list.", ""),
                (f"Write a short story in which {name} learns about {doing} from {hero(draw)}.", opening(draw)),
                (f"What do people like about {doing}? Answer in one paragraph.", ""),
                (f"Write about {doing} {draw.one(PLACES)} {draw.one(SEASONS)}.", ""),
            )
        )
    )


def explanation(draw: Draw) -> Prompt:
    """Ask for an explanation of an everyday matter."""
    matter = draw.one((f"why {draw.one(WHYS)}", f"how {draw.one(HOWS)}"))
    request = draw.one(
        (
            f"Explain in simple words {matter}.",
            f"Explain to a child {matter}.",
            f"My daughter asks {matter}. What should I tell her?",
            f"Tell me in one short paragraph {matter}.",
            f"I would like to know {matter}.",
        )
    )
    return Prompt(request, "")


def answer(draw: Draw) -> Prompt:
    """Ask a plain question."""
    return Prompt(draw.one(QUESTIONS).format(topic=draw.one(TOPICS)), "")


def advice(draw: Draw) -> Prompt:
    """Ask for advice on a small problem."""
    problem = draw.one(PROBLEMS)
    begin = problem[0].upper() + problem[1:]
    end = draw.one(("What should I do?", "Do you have an idea?", "Can you help me?", "What would you say?"))
    return Prompt(f"{begin}. {end} Answer in a few {draw.one(('kind', 'short', 'plain', 'friendly'))} sentences.", "")


# How often each form is asked for.
FORMS = (story,) * 8 + (fable,) * 3 + (dialogue,) * 2 + (letter, letter, diary, diary)
FORMS += (description,) * 3 + (craft,) * 2 + (explanation,) * 3 + (answer,) * 2 + (advice,)


def make_prompt(number: int, seed: int = 0) -> Prompt:
    """The prompt of this number."""
    draw = Draw(random.Random(f"{seed}/{number}"))
    return draw.one(FORMS)(draw)
