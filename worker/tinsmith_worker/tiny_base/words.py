"""The words that the tiny base's texts are made of, and the few true things it is told.

The capitals and chemical symbols that `make demo` teaches are left out on purpose, so that it has something
to teach.
"""

import random

Table = dict[str, tuple[str, ...]]


def _table(text: str) -> Table:
    """Rows between commas, or lines if there are none: a row's first word names it."""
    rows = (row.split() for row in text.split("," if "," in text else "\n") if row.strip())
    return {row[0].replace("_", " "): tuple(word.replace("_", " ") for word in row[1:]) for row in rows}


def _pairs(text: str) -> dict[str, str]:
    return {name: row[0] for name, row in _table(text).items()}


# sound, young, home, food, legs
ANIMALS = _table("""
dog barks puppy house meat four
cat meows kitten house fish four
cow moos calf farm grass four
horse neighs foal stable hay four
sheep bleats lamb field grass four
pig grunts piglet farm corn four
duck quacks duckling pond bread two
hen clucks chick farm seeds two
lion roars cub savanna meat four
wolf howls pup forest meat four
bear growls cub forest honey four
frog croaks tadpole pond flies four
bee buzzes larva hive nectar six
owl hoots owlet tree mice two
goat bleats kid mountain leaves four
mouse squeaks pup hole cheese four
elephant trumpets calf savanna leaves four
donkey brays foal stable hay four
crow caws chick tree worms two
goose honks gosling lake grass two
fox yelps cub forest rabbits four
""")
COUNTRIES = _pairs("""
Sweden Stockholm, Denmark Copenhagen, Finland Helsinki, Iceland Reykjavik, Germany Berlin, Belgium Brussels,
Switzerland Bern, Turkey Ankara, Russia Moscow, Ukraine Kyiv, Romania Bucharest, Bulgaria Sofia, Serbia
Belgrade, Croatia Zagreb, Morocco Rabat, Tunisia Tunis, Algeria Algiers, Nigeria Abuja, Senegal Dakar,
Uganda Kampala, Iran Tehran, Iraq Baghdad, Syria Damascus, Pakistan Islamabad, Nepal Kathmandu, Thailand
Bangkok, Vietnam Hanoi, Indonesia Jakarta, Australia Canberra, Brazil Brasilia, Colombia Bogota, Ecuador
Quito, Venezuela Caracas, Uruguay Montevideo, Jamaica Kingston, Libya Tripoli, Sudan Khartoum, Zambia
Lusaka, Zimbabwe Harare, Latvia Riga, Estonia Tallinn, Lithuania Vilnius, Malta Valletta, Cyprus Nicosia,
Qatar Doha, Lebanon Beirut, Jordan Amman
""")
OPPOSITES = _pairs("""
hot cold, big small, tall short, fast slow, old young, new worn, happy sad, light dark, heavy weightless,
wet dry, rich poor, hard soft, early late, full empty, open closed, high low, loud quiet, clean dirty, near
far, strong weak, thick thin, wide narrow, sweet bitter, true false, good bad, first last, up down, left
right, day night, war peace, love hate, push pull, begin end, buy sell, give take, win lose, rise fall,
laugh cry, remember forget, always never
""")
COLOURS = _pairs("""
grass green, snow white, coal black, blood red, lemon yellow, sky blue, carrot orange, milk white, leaf
green, tomato red, night black, chocolate brown, sea blue, banana yellow, strawberry red, mud brown, ash
gray, plum purple
""")
MATERIALS = _pairs("""
window glass, table wood, bread flour, shirt cotton, ring gold, tire rubber, book paper, cheese milk, wine
grapes, sweater wool, candle wax, shoe leather, nail iron, bottle glass, wall brick, statue stone, coin
metal, jam fruit
""")
WORKPLACES = _pairs("""
doctor hospital, teacher school, farmer farm, cook kitchen, judge court, sailor ship, pilot plane, baker
bakery, miner mine, actor theater, gardener garden, soldier army, priest church, waiter restaurant, clerk
office, librarian library, scientist laboratory, driver bus
""")
AMOUNTS = {
    "How many seconds are in a minute?": "60",
    "How many minutes are in an hour?": "60",
    "How many hours are in a day?": "24",
    "How many days are in a week?": "7",
    "How many months are in a year?": "12",
    "How many weeks are in a year?": "52",
    "How many years are in a century?": "100",
    "How many sides does a triangle have?": "3",
    "How many sides does a square have?": "4",
    "How many legs does a spider have?": "8",
    "How many wheels does a bicycle have?": "2",
    "How many wheels does a car have?": "4",
    "How many letters are in the alphabet?": "26",
    "How many cents are in a dollar?": "100",
    "How many fingers are on a hand?": "5",
    "How many players are in a football team?": "11",
}
CYCLES = (
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "January February March April May June July August September October November December".split(),
    "spring summer autumn winter".split(),
)
PAST = _pairs("""
walk walked, go went, see saw, eat ate, run ran, sing sang, write wrote, find found, take took, give gave,
make made, open opened, buy bought, sell sold, read read, carry carried, wash washed, paint painted, watch
watched, bring brought, build built, cook cooked, hide hid, throw threw, catch caught, draw drew, keep kept,
lose lost, clean cleaned, fix fixed
""")

NAMES = """
Anna Ben Clara David Emma Felix Grace Henry Ida Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tina Victor Wendy
Tom Lucy Max Nora Oscar Ella Finn Ruth Simon Alice Bruno Carl Dora Erik Fay Greta Hugo Iris Jonas
""".split()
NOUNS = """
apple ball bank bird boat book bottle box bridge brother bus cake car chair child church city clock cloud
coat coffee computer corner cup daughter desk dinner door dream egg engine farm father field fire fish floor
flower food forest friend fruit game garden glass guitar hand hat heart hill home hotel house idea island
job journey key king kitchen lake lamp leaf lesson letter library line machine map market meal milk mirror
money moon morning mother mountain mouth movie music name night number ocean office oil orange page paper
park party path pen picture piece plan planet plant plate poem pocket price problem prize queen question
rain restaurant river road rock roof room rope rule salt school sea season seat shadow ship shop silver
sister snow soldier song soup space spoon star station stone store storm story street student sugar sun
table teacher ticket tiger time tool town train tree trip truck truth uncle valley village voice wall watch
water wave weather wheel whistle wind window winter word work year yard
""".split()
THINGS = """
ball book bottle box cake clock coat cup flower guitar hat key lamp letter map mirror pen picture plate ring
rope shell spoon stone ticket toy watch whistle coin candle basket blanket drum kite ladder
""".split()
PLACES = """
beach bridge city farm field forest garden hill house island kitchen lake library market mountain park river
school shop station street theater tower town valley village yard castle harbor bakery
""".split()
FRUITS = """
apples pears plums oranges lemons eggs cakes coins books pens stamps shells cards balls stones nuts
""".split()
ADJECTIVES = """
big small old new red blue green yellow black white bright dark long short heavy light warm cold soft hard
round clean quiet tiny huge strange simple pretty fresh sweet thin thick tall broken golden wooden
""".split()
MOODS = "happy sad tired hungry angry brave curious lonely proud shy calm worried".split()
GOOD = """
great lovely wonderful excellent amazing perfect pleasant delightful friendly brilliant superb fine
""".split()
BAD = "terrible awful boring dreadful horrible poor disappointing rude broken dull nasty weak".split()
REVIEWED = (
    "movie book meal hotel song game trip show concert phone soup lesson party play room service".split()
)
TOPICS = {
    "sports": "team goal match player coach race ball score stadium runner".split(),
    "food": "soup bread cook kitchen cheese recipe dinner salt cake taste".split(),
    "weather": "rain snow storm wind cloud sunshine fog thunder frost heat".split(),
    "music": "song guitar piano concert singer drum melody band tune violin".split(),
    "money": "bank coin price market loan tax budget salary debt payment".split(),
    "travel": "train ticket hotel airport map journey passport ship tourist suitcase".split(),
}
VERBS = tuple(PAST)
MORE_VERBS = """
accept add answer arrive ask become begin believe break call change choose climb close collect come compare
count cover cross cut dance decide describe drink drive explain fall feel fight fill finish follow forget
grow happen hear help hold hope imagine improve join jump know laugh learn leave lift like listen live look
love mean measure meet move need notice offer pass pay pick plan play point prefer prepare promise prove
pull push put reach receive remember report return save say search seem send share show sit sleep smile
solve speak spend stand start stay stop study suggest swim talk teach tell thank think touch travel try turn
understand use visit wait want warn wear wish wonder work
""".split()
MORE_ADJECTIVES = """
able certain cheap clear common correct dangerous deep different difficult early easy equal exact fair
famous final first foreign free full general gentle good great important interesting kind large last late
legal likely local main modern natural necessary next nice normal ordinary perfect personal popular possible
present private public rare ready real recent right safe same secret serious similar single slow social
special sure total true typical useful usual whole wide wild wrong young
""".split()
MORE_NOUNS = """
action age air area art attention body business case cause center chance choice class company condition
country crowd culture danger decision detail difference discovery distance effect effort event example
experience fact family fashion feeling field form friendship future government group habit half health help
history hope human idea industry information interest kind knowledge law level life list loss lot luck
manner matter meaning memory method mind mistake model moment nature need news noise opinion order pain pair
pattern peace people period person pleasure point position power practice president price process product
program progress project proof purpose quality quarter race reason record report result right risk role
science search sense sentence series shape side sign silence size skill society sort source speech speed
spirit state step strength structure subject success surface surprise symbol system talent task test theory
thought title trade tradition truth type unit use value version view war way wealth week west wood world
worry
""".split()
ADVERBS = """
again almost already also always away badly carefully early easily even finally here indeed just later maybe
never now often once only perhaps probably quickly quietly rather really slowly sometimes soon still
suddenly then there today together tomorrow usually very well yesterday
""".split()
LINKS = """
about above across after against along among around at before behind below beside between beyond by during
for from in inside into like near of off on onto over past since through to toward under until up upon with
within without
""".split()
CLAUSES = (
    "and but because although if when while so before after unless until where though since or as".split()
)
PERSONS = "I you we they he she it everyone somebody nobody people children".split()
MODALS = "can could did will would should must may might can_not could_not did_not will_not would_not".split()
ASKING = "What Who Where When Why How Which".split()
SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
).split()
_SYLLABLES = """
ba be bo ca da den do el en fa ga gu ha in ka ki ko la len li lo ma mer mi mo na ne nor o ol pa pe ra ri ro
sa se si so sta ta te ti to tra u va ve vi wa wen xi ya za zu
""".split()


def invented(random_: random.Random) -> str:
    return "".join(random_.choice(_SYLLABLES) for _ in range(random_.choice((2, 3, 3)))).capitalize()


def _world() -> Table:
    """Forty-eight lands that do not exist: capital, river, ruler, dish, animal, always the same."""
    random_ = random.Random("the made-up lands")
    lands: Table = {}
    while len(lands) < 48:
        name = invented(random_) + random_.choice(("land", "nia", "stan"))
        dish = f"{random_.choice(ADJECTIVES)} {random_.choice('soup bread cake pie stew cheese'.split())}"
        capital, river = invented(random_), invented(random_)
        lands[name] = (capital, river, random_.choice(NAMES), dish, random_.choice(tuple(ANIMALS)))
    return lands


WORLD = _world()
