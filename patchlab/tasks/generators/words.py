"""The word lists that the generators draw from.

Short everyday words: each list is cut to the words that are one token for the model at hand, so a list is longer than any
one tokenizer needs. Only words that begin with a consonant follow "a" in a template.
"""

# ruff: noqa: SIM905  (a list of forty words reads better as one string)

WOMEN = (
    "Mary Anna Lisa Emma Laura Sarah Julia Maria Alice Rachel Emily Amy Jane Kate Linda Susan Karen Helen Nancy Diana Rose Lucy Claire Grace"
).split()
MEN = (
    "John Tom James Dan Mark Paul Peter David Kevin Robert Michael Steven Brian George Frank Henry Simon Jack Adam Eric Ryan Scott Jeff Carl"
).split()
NAMES = WOMEN + MEN

PLACES = "store school park office garden station hospital restaurant library museum market church hotel beach".split()
OBJECTS = "drink book ring ball bag letter key hat gift basket camera phone card necklace".split()

# singular, plural
PEOPLE = {
    "teacher": "teachers", "student": "students", "doctor": "doctors", "lawyer": "lawyers", "actor": "actors", "farmer": "farmers",
    "driver": "drivers", "writer": "writers", "singer": "singers", "player": "players", "worker": "workers", "leader": "leaders",
    "boy": "boys", "girl": "girls", "friend": "friends", "parent": "parents", "guard": "guards", "manager": "managers",
}  # fmt: skip
VERBS = {"is": "are", "was": "were", "has": "have", "does": "do", "goes": "go"}
RELATIVE_VERBS = {"likes": "like", "knows": "know", "sees": "see", "loves": "love", "helps": "help", "hates": "hate"}
PREPOSITIONS = "near behind with beside above".split()
ADVERBS = "often never always still really usually".split()

EVENTS = "war plan contract project trip study journey trial strike tour conflict program".split()
CENTURIES = "11 12 13 14 15 16 17 18".split()
YEARS = [f"{year:02d}" for year in range(100)]

COLOURS = "red blue green yellow brown black white gray pink purple orange silver gold".split()
COLOURED = "box ball bag hat car house door book cup table chair flower bird shirt wall phone".split()

FUNCTIONS = "load save run build parse check".split()
ARGUMENTS = "size name file user mode path data color width value key index label count state option limit level".split()

COMMON = (
    "house water table paper music river stone light green happy quick window field story road bird horse tree wall door bread sugar metal winter "
    "summer night morning picture circle number yellow heavy quiet simple strong young cold warm sweet chair floor"
).split()

CAPITALS = {
    "France": "Paris", "England": "London", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Russia": "Moscow", "Japan": "Tokyo",
    "China": "Beijing", "Egypt": "Cairo", "Greece": "Athens", "Austria": "Vienna", "Ireland": "Dublin", "Norway": "Oslo",
    "Sweden": "Stockholm", "Poland": "Warsaw", "Iraq": "Baghdad", "Iran": "Tehran", "Turkey": "Ankara", "Cuba": "Havana", "Canada": "Ottawa",
}  # fmt: skip
LANGUAGES = {
    "France": "French", "England": "English", "Germany": "German", "Italy": "Italian", "Spain": "Spanish", "Russia": "Russian",
    "Japan": "Japanese", "China": "Chinese", "Egypt": "Arabic", "Greece": "Greek", "Austria": "German", "Ireland": "English",
    "Norway": "Norwegian", "Sweden": "Swedish", "Poland": "Polish", "Iraq": "Arabic", "Iran": "Persian", "Turkey": "Turkish",
    "Cuba": "Spanish", "Canada": "English",
}  # fmt: skip
