"""How the writers of the E2E data (Novikova et al. 2017) say a fact, for the labeler.

The same form as `phrasings.PHRASES`: blank -> level -> phrases; collected from its training part.
Prices in pounds and ratings in stars stand for levels, as the writers change freely between them.
"""


def _either(*texts: str) -> tuple[str, ...]:
    """All phrases of the texts, which part them with "|"."""
    return tuple(phrase for text in texts for phrase in text.split("|"))


def _pairs(firsts: str, seconds: str) -> tuple[str, ...]:
    """Every first phrase followed by every second one."""
    return tuple(f"{first} {second}" for first in _either(firsts) for second in _either(seconds))


_PRICE = "price|prices|priced|price range|price ranges|pricing|cost|costs|in price"
_PRICE_IS = "price is|prices are|price range is|price range of|price range|cost is|priced"
_RATING = "rating|ratings|rated|customer rating|customer ratings|customer rated|star rating"
_RATING += "|user rating|rating by customers|customer satisfaction|customer satisfaction rating"
_RATING += "|customer service rating|review|reviews|customer review|customer reviews|quality|scores"
_RATING_IS = "rated|is rated|it is rated|rated as|rate it|customers rate it|rating is|rating of"
_RATING_IS += "|customer rating is|customer rating of|customer ratings are|ratings are|reviews are"
_STARS = "out of 5|out of five|of 5|of five|/ 5|star|stars"
_CHILDREN = "family|families|kid|kids|child|children|childrens|child's|children's|kid's|baby"
_GOOD_FOR = "friendly to|friendly for|good for|great for|suitable for|perfect for|ideal for|for"
_GOOD_FOR += "|appropriate for|open to|caters to|welcome|welcomes|welcoming|welcoming to|allows"
_GOOD_FOR += "|bring your|bring the"
_BAD_FOR = "no|not for|isn't for|not good for|not suitable for|not suited for|unsuitable for"
_BAD_FOR += "|not recommended for|not friendly for|not friendly to|not cater to|not welcome"
_BAD_FOR += "|not allow|doesn't allow|doesn't welcome|no place for|not a place for"
_NOT = "not|not a|not very|not at all|is not a|isn't|isn't a|aren't|non|no"
_FRIENDLY = "family friendly|families friendly|kid friendly|kids friendly|child friendly"
_FRIENDLY += "|children friendly|friendly|friendly for families|friendly to families"

E2E_PHRASES: dict[str, dict[str, tuple[str, ...]]] = {
    "type": {
        "pub": _either("pub|pubs|bar|public house"),
        "restaurant": _either("restaurant|restaurants"),
        "coffee shop": _either("coffee shop|coffee shops|coffee house|coffeeshop|cafe"),
    },
    "food": {
        "Chinese": ("chinese",),
        "English": _either("english|british|fish and chips"),
        "Fast food": _either("fast food|fast foods|burgers"),
        "French": ("french",),
        "Indian": _either("indian|curry"),
        "Italian": _either("italian|pasta|pizza"),
        "Japanese": _either("japanese|sushi"),
    },
    "price": {
        "cheap": (
            *_pairs("low|lower|lowest|small|cheap|affordable|inexpensive", _PRICE),
            *_pairs(_PRICE_IS, "low|cheap"),
            *_either("cheap|cheaply|cheaper|inexpensive|not expensive|affordable|budget|low end"),
            *_pairs("less than|less that|lower than|under|below", "£20|20|20 pounds"),
        ),
        "moderate": (
            *_pairs("moderate|moderately|average|medium|mid|middle|reasonable|fair|decent", _PRICE),
            *_pairs(_PRICE_IS, "moderate|average|medium"),
            *_pairs("moderately|reasonably|averagely|average|fairly|mid", "priced"),
            *_either("moderate|mid range|£20 25|£20 £25|£20 to £25|£20 and £25"),
            *_either("20 25|20 to 25|20 25 pounds|20 to 25 pounds"),
        ),
        "high": (
            *_pairs("high|higher|highly|upper|expensive", _PRICE),
            *_pairs(_PRICE_IS, "high|expensive"),
            *_either("expensive|pricey|costly|upscale|upmarket|high end|high class"),
            *_pairs("more than|more then|higher than|over|above|at least", "£30|30|30 pounds"),
            *_either("£30|£30 and up"),
        ),
    },
    "rating": {
        "low": (
            *_pairs("low|lowly|lowest|low level|poor|poorly|bad|1|one", _RATING),
            *_pairs(_RATING_IS, "low|lowly|poor|poorly|bad|1|one"),
            *_pairs("1|one", _STARS),
        ),
        "average": (
            *_pairs("average|averagely|mediocre|medium|moderate|decent|3|three", _RATING),
            *_pairs(_RATING_IS, "average|averagely|mediocre|moderate|3|three"),
            *_pairs("3|three", _STARS),
        ),
        "high": (
            *_pairs("high|highly|highest|very high|excellent|great|well|good|top|5|five", _RATING),
            *_pairs(_RATING_IS, "high|highly|very high|excellent|great|well|good|top|5|five"),
            *_pairs("5|five", _STARS),
        ),
    },
    "area": {
        "riverside": _either("riverside|river side|river|riverfront|riverbank|waterside"),
        "city centre": (
            *_pairs("city|city's|town", "centre|center"),
            *_pairs("centre|center|middle|heart", "of the city|of town"),
            *_either("center city|centre city|city centered|downtown|central"),
        ),
    },
    "family friendly": {
        "yes": (
            *_pairs(_CHILDREN, "friendly|oriented|welcome|are welcome"),
            *_pairs(_GOOD_FOR, _CHILDREN),
            *_either("friendly|family|families|whole family|all ages"),
        ),
        "no": (
            *_pairs(_NOT, _FRIENDLY),
            *_pairs(_BAD_FOR, _CHILDREN),
            *_pairs(_CHILDREN, "unfriendly|not welcome|are not welcome|aren't welcome"),
            *_pairs(_CHILDREN, "not allowed|are not allowed"),
            *_either("adult|adults|adult only|adults only|unfriendly|without kids"),
        ),
    },
}
