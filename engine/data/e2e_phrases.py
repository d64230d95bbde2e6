"""How the writers of the E2E data (Novikova et al. 2017) say a fact, for the labeler.

The same form as `phrasings.PHRASES`: slot -> level -> phrases. Collected from its training part;
prices in pounds and ratings in stars stand for the levels cheap, moderate, high and low, average,
high, because the writers change freely between the two.
"""


def _pairs(first: str, second: str) -> tuple[str, ...]:
    """Every phrase of the first list followed by every one of the second; "|" parts phrases."""
    return tuple(f"{a} {b}".strip() for a in first.split("|") for b in second.split("|"))


_PRICES = "price|prices|priced|price range|price ranges|pricing|cost|costs|in price"
_RATINGS = "rating|ratings|rated|customer rating|customer ratings|reviews|review|customer reviews"
_RATINGS += "|customer satisfaction|customer satisfaction rating|customer service rating|quality"
_RATINGS += "|customer rated|customer review|scores|rating by customers|star rating|user rating"
_RATES = "rated|is rated|customer rating is|customer rating of|customer ratings are|ratings are"
_RATES += "|rating is|rating of|reviews are|rated as|rate it|it is rated|customers rate it"
_CHILDREN = "family|families|kid|kids|child|children|childrens|child's|children's|kid's|baby"
_NOT = "not|non|isn't|aren't|no|not a|isn't a|not very|not at all|is not a|un"


PHRASES: dict[str, dict[str, tuple[str, ...]]] = {
    "type": {
        "pub": ("pub", "pubs", "bar", "public house"),
        "restaurant": ("restaurant", "restaurants"),
        "coffee shop": ("coffee shop", "coffee shops", "coffee house", "coffee place", "cafe", "coffeeshop"),
    },
    "food": {
        "Chinese": ("chinese",),
        "English": ("english", "british", "fish and chips", "traditional english"),
        "Fast food": ("fast food", "fast foods", "burgers"),
        "French": ("french",),
        "Indian": ("indian", "curry"),
        "Italian": ("italian", "pasta", "pizza"),
        "Japanese": ("japanese", "sushi"),
    },
    "price": {
        "cheap": (
            *_pairs("low|cheap|lower|small|lowest|affordable|inexpensive", _PRICES),
            *_pairs("price is|prices are|price range is|price range of|cost is|priced", "low|cheap"),
            *("cheap", "inexpensive", "affordable", "cheaply", "cheaper", "low budget", "budget"),
            *("less than £20", "under £20", "below £20", "less that £20", "lower than £20"),
            *("less than 20", "under 20", "less than 20 pounds", "not expensive", "low end"),
        ),
        "moderate": (
            *_pairs("moderate|average|medium|mid|reasonable|middle|fair|moderately|decent", _PRICES),
            *_pairs("price is|prices are|price range is|price range of|price range", "moderate|average|medium|£20 25"),
            *("moderate", "moderately priced", "reasonably priced", "mid priced", "mid range"),
            *("£20 25", "£20 £25", "£20 to £25", "20 25", "£20 and £25", "20 25 pounds", "20 to 25 pounds", "averagely priced", "average priced", "fairly priced"),
        ),
        "high": (
            *_pairs("high|higher|highly|expensive|upper", _PRICES),
            *_pairs("price is|prices are|price range is|price range of|price range", "high|expensive"),
            *("expensive", "pricey", "costly", "upscale", "high end", "upmarket", "high class"),
            *("more than £30", "over £30", "above £30", "more then £30", "more than 30"),
            *("more than 30 pounds", "higher than £30", "£30 and up", "at least £30", "£30"),
        ),
    },
    "rating": {
        "low": (
            *_pairs("low|poor|poorly|bad|lowly|1|one|low level|lowest", _RATINGS),
            *_pairs(_RATES, "low|poor|poorly|bad|lowly|1|one"),
            *_pairs("1|one", "out of 5|out of five|star|stars|/ 5|of 5|of five"),
        ),
        "average": (
            *_pairs("average|mediocre|medium|averagely|3|three|moderate|decent", _RATINGS),
            *_pairs(_RATES, "average|mediocre|averagely|3|three|moderate"),
            *_pairs("3|three", "out of 5|out of five|star|stars|/ 5|of 5|of five"),
        ),
        "high": (
            *_pairs("high|highly|excellent|great|well|good|top|5|five|highest|very high", _RATINGS),
            *_pairs(_RATES, "high|highly|excellent|great|well|good|top|5|five|very high"),
            *_pairs("5|five", "out of 5|out of five|star|stars|/ 5|of 5|of five"),
        ),
    },
    "area": {
        "riverside": (
            *("riverside", "river side", "river", "riverfront", "waterside", "riverbank"),
        ),
        "city centre": (
            *("city centre", "city center", "centre of the city", "center of the city", "city's centre", "city's center"),
            *("town centre", "town center", "centre of town", "center of town", "heart of the city"),
            *("center city", "centre city", "downtown", "middle of the city", "city centered", "central"),
        ),
    },
    "family friendly": {
        "yes": (
            *_pairs(_CHILDREN, "friendly|are welcome|welcome|oriented"),
            *_pairs("friendly to|friendly for|good for|great for|suitable for|perfect for|welcomes|welcome|ideal for|welcoming to|welcoming|allows|open to|appropriate for|caters to|bring your|bring the|for", _CHILDREN),
            *("friendly", "whole family", "the whole family", "all ages", "family", "families"),
        ),
        "no": (
            *_pairs(_NOT, "family friendly|kid friendly|kids friendly|child friendly|children friendly"),
            *_pairs(_NOT, "friendly|families friendly|friendly for families|friendly to families"),
            *_pairs("no|not for|not welcome|not allow|not good for|not suitable for|doesn't welcome|isn't for|not suited for|unsuitable for|not cater to|no place for|not friendly for|not friendly to|not a place for|not recommended for|doesn't allow", _CHILDREN),
            *_pairs(_CHILDREN, "are not welcome|not welcome|are not allowed|not allowed|unfriendly|aren't welcome"),
            *("adult", "adults", "adults only", "adult only", "unfriendly", "without kids"),
        ),
    },
}  # fmt: skip
