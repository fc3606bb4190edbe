"""Two hundred pydantic models as people write them for extraction, tools and agents.

Written as fields rather than classes, to be read at a glance: `name=type`, or `name=(type, default)`.
"""

from __future__ import annotations

from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from ipaddress import IPv4Address, IPv6Address
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import AnyUrl, BaseModel, ConfigDict, Field, conint, conlist, constr, create_model

Short = Annotated[str, Field(max_length=24)]
Name = Annotated[str, Field(min_length=1, max_length=24)]
Slug = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,15}$")]
Code = Annotated[str, Field(pattern=r"^[A-Z]{3}$")]
Zip = Annotated[str, Field(pattern=r"^\d{5}$")]
Phone = Annotated[str, Field(pattern=r"^\+?[0-9]{6,12}$")]
Email = Annotated[str, Field(json_schema_extra={"format": "email"})]
Age = Annotated[int, Field(ge=0, le=130)]
Count = Annotated[int, Field(ge=0)]
Score = Annotated[float, Field(ge=0, le=1)]
Stars = Annotated[int, Field(ge=1, le=5)]
Percent = Annotated[float, Field(gt=0, lt=100)]
Money = Annotated[float, Field(ge=0, le=1e6)]
Tags = Annotated[list[Slug], Field(max_length=3)]
Names = Annotated[list[Name], Field(min_length=1, max_length=3)]


class Colour(Enum):
    RED = "red"
    GREEN = "green"
    BLUE = "dark blue"


class Level(IntEnum):
    LOW = 1
    MIDDLE = 5
    HIGH = 10


class Sentiment(StrEnum):
    GOOD = "positive"
    BAD = "negative"
    NONE = "neutral"


class Mixed(Enum):
    ONE = 1
    TWO = "two"
    HALF = 0.5
    NOTHING = None


class FamilyTree(BaseModel):
    name: Name
    children: Annotated[list[FamilyTree], Field(max_length=2)]


class Ancestor(BaseModel):
    name: Name
    mother: Ancestor | None = None
    father: Ancestor | None = None


class Region(BaseModel):
    name: Name
    regions: Annotated[list[Region], Field(max_length=2)] = []


class Outline(BaseModel):
    title: Name
    sections: Annotated[list[Outline], Field(max_length=2)] = []


class Tree(BaseModel):
    label: Name
    left: Tree | None = None
    right: Tree | None = None


class Folder(BaseModel):
    name: Slug
    files: Annotated[list[Slug], Field(max_length=2)]
    folders: Annotated[list[Folder], Field(max_length=2)]


class Linked(BaseModel):
    value: int
    next: Linked | None = None


class Expression(BaseModel):
    op: Literal["+", "*"]
    left: int | Expression
    right: int | Expression


RECURSIVE = (FamilyTree, Ancestor, Region, Outline, Tree, Folder, Linked, Expression)
MODELS: dict[str, type[BaseModel]] = {made.__name__: made for made in RECURSIVE}
UNSAID = frozenset({"Price", "Ledger", "Bookmark", "Feed"})
"""Their schemas allow what pydantic does not: a Decimal as any text, a URL as any URI."""


def model(name: str, /, *, config: ConfigDict | None = None, **fields: Any) -> type[BaseModel]:
    made: type[BaseModel] = create_model(
        name,
        __config__=config,
        **{key: given if isinstance(given, tuple) else (given, ...) for key, given in fields.items()},
    )
    MODELS[name] = made
    return made


# People
Person = model("Person", name=Name, age=Age)
model("PersonWithNick", name=Name, nick=(Short | None, None))
model("PersonOrNobody", name=Name | None, age=Age | None)
Address = model("Address", street=Short, zip=Zip, city=Name, country=(Code, "DEU"))
Contact = model("Contact", email=Email, phone=(Phone | None, None), address=(Address | None, None))
model("Customer", id=UUID, person=Person, contact=Contact, since=date)
model("Employee", name=Name, manager=(Name | None, None), salary=Money, level=Level)
model("Household", address=Address, members=Annotated[list[Person], Field(min_length=1, max_length=3)])
model("Birthday", name=Name, born=date)
model("Login", user=Slug, password=Annotated[str, Field(min_length=8, max_length=16)])
model("Profile", user=Slug, bio=(Short, ""), colours=list[Colour])
model("Friendship", a=Person, b=Person, since=(date | None, None))
model("Signature", name=Name, signed_at=datetime)
model("Passport", number=Annotated[str, Field(pattern=r"^[A-Z0-9]{9}$")], country=Code, expires=date)
model("Gender", value=Literal["female", "male", "other", "unknown"])
model("Resume", name=Name, skills=Names, years=Count, languages=dict[Code, Stars])
Job = model("Job", title=Name, company=Name, start=date, end=(date | None, None))
model("Career", person=Person, jobs=Annotated[list[Job], Field(max_length=2)])

# Commerce
Item = model("Item", sku=Slug, quantity=Annotated[int, Field(ge=1, le=999)], price=Money)
model("Order", id=UUID, items=Annotated[list[Item], Field(min_length=1, max_length=3)], placed=datetime)
model("Cart", items=Annotated[dict[Slug, Count], Field(max_length=3)])
model("Price", amount=Decimal, currency=Code)
model("Discount", percent=Percent, code=(Slug | None, None))
model("Invoice", number=Annotated[str, Field(pattern=r"^INV-\d{4}$")], total=Money, due=date, paid=bool)
model("Receipt", shop=Name, lines=list[Item], vat=Annotated[float, Field(multiple_of=0.5, ge=0, le=30)])
model("Refund", order=UUID, reason=Literal["damaged", "late", "wrong item"], amount=(Money | None, None))
model("Ledger", entries=Annotated[list[tuple[date, Decimal]], Field(max_length=2)])
model("Coupon", code=Code, valid_until=(datetime | None, None), uses=Annotated[int, Field(gt=0)])
Product = model("Product", name=Name, price=Money, colours=(list[Colour], []), tags=(Tags, []))
model("Catalogue", products=Annotated[list[Product], Field(max_length=2)], currency=Code)
model("Stock", levels=dict[str, Annotated[int, Field(ge=-5, le=5)]])
model("Rating", stars=Stars, text=(Short | None, None))
model("Review", product=Product, rating=Stars, verified=bool)
model("Shipment", weight=Annotated[float, Field(gt=0)], size=tuple[Count, Count, Count])
model("Subscription", plan=Literal["free", "pro"], seats=Annotated[int, Field(ge=1, multiple_of=5)])
model("Auction", bids=Annotated[list[Money], Field(min_length=1, max_length=4)])
model("ExchangeRate", base=Code, quote=Code, rate=Annotated[float, Field(gt=0, le=1000)])
CardPayment = model("CardPayment", kind=Literal["card"], last4=Annotated[str, Field(pattern=r"^\d{4}$")])
BankPayment = model("BankPayment", kind=Literal["bank"], iban=Annotated[str, Field(pattern=r"^[A-Z]{2}\d{8}$")])
CashPayment = model("CashPayment", kind=Literal["cash"])
Payment = Annotated[CardPayment | BankPayment | CashPayment, Field(discriminator="kind")]
model("Checkout", payment=Payment, total=Money)
model("Payments", payments=Annotated[list[Payment], Field(max_length=3)])
model("MaybePayment", payment=(Payment | None, None))

# Calendar
model("Meeting", title=Name, start=datetime, minutes=Annotated[int, Field(ge=5, le=480)])
model("Alarm", at=time, days=Annotated[list[Literal["mon", "tue", "wed"]], Field(max_length=3)])
model("Timer", length=timedelta)
model("Holiday", first=date, last=date, where=(Name | None, None))
model("Deadline", what=Name, when=date | datetime)
Slot = model("Slot", start=datetime, end=datetime)
model("Availability", slots=Annotated[list[Slot], Field(max_length=2)], zone=Slug)
model("Recurring", every=Literal[1, 2, 7, 30], unit=Literal["day", "week"])
model("Invitation", event=Name, guests=Names, answer=(Literal["yes", "no", "maybe"] | None, None))
model("Reminder", text=Name, at=datetime, repeat=(timedelta | None, None))
model("Schedule", entries=Annotated[dict[Slug, Slot], Field(max_length=2)])
model("OpeningHours", monday=(tuple[time, time] | None, None), sunday=(tuple[time, time] | None, None))

# Geography
Point = model("Point", lat=Annotated[float, Field(ge=-90, le=90)], lon=Annotated[float, Field(ge=-180, le=180)])
model("Route", points=Annotated[list[Point], Field(min_length=2, max_length=3)])
model("Box", corners=tuple[Point, Point])
model("Place", name=Name, at=Point, population=(Count | None, None))
model("Country", name=Name, capital=Name, neighbours=Annotated[list[Code], Field(max_length=3)])
model("Weather", temperature=Annotated[float, Field(ge=-60, le=60)], wind=(Count, 0), sky=Literal["clear", "cloudy"])
model("Forecast", days=Annotated[list[tuple[date, float]], Field(max_length=2)])
model("Elevation", metres=Annotated[int, Field(gt=-500, lt=9000)])
model("Polygon", rings=Annotated[list[Annotated[list[Point], Field(max_length=2)]], Field(max_length=2)])
model("Feature", type=Literal["Feature"], geometry=Point, properties=dict[str, str | int | None])
model("Earthquake", magnitude=Annotated[float, Field(ge=0, le=10)], depth_km=Percent, at=Point)

# Extraction
Entity = model("Entity", text=Name, kind=Literal["person", "place", "organisation"], confidence=Score)
model("Entities", entities=Annotated[list[Entity], Field(max_length=3)])
model("Relation", subject=Entity, predicate=Name, object=Entity)
model("Graph", nodes=Names, edges=Annotated[list[tuple[Count, Count]], Field(max_length=3)])
model("Sentence", text=Short, sentiment=Sentiment)
model("Classification", label=Colour, scores=dict[Literal["red", "green"], Score])
model("Keywords", keywords=conlist(Short, min_length=1, max_length=5))
model("Summary", title=Name, points=Names, length=(Count | None, None))
model("Answer", answer=Short, sources=(Annotated[list[Count], Field(max_length=3)], []), confident=bool)
Citation = model("Citation", source=Count, quote=Short)
model("CitedAnswer", answer=Short, citations=Annotated[list[Citation], Field(max_length=2)])
model("Table", header=Names, rows=Annotated[list[Annotated[list[Short], Field(max_length=3)]], Field(max_length=2)])
model("KeyValues", pairs=Annotated[dict[str, str], Field(max_length=3)])
model("Date", year=Annotated[int, Field(ge=1, le=9999)], month=(conint(ge=1, le=12) | None, None))
model("Measurement", value=float, unit=Literal["m", "kg", "s"])
model("Translation", source=Short, target=Short, language=Annotated[str, Field(pattern=r"^[a-z]{2}(-[A-Z]{2})?$")])
model("Spam", is_spam=bool, reason=(Short | None, None))
model("YesNo", answer=Literal["yes", "no"])
model("Number", number=int)
model("Real", number=float)
model("Truth", value=bool)
model("Nothing", value=None)
model("Text", text=str)
model("Anything", value=Any)
model("ManyThings", values=Annotated[list[Any], Field(max_length=2)])
model("MixedEnum", value=Mixed)
model("OneColour", colour=Colour)
model("Levels", levels=Annotated[list[Level], Field(max_length=4)])
model("Toxicity", insult=Score, threat=Score, spam=Score)
model("Headline", text=constr(min_length=5, max_length=30))
model("Bookmark", url=AnyUrl, title=(Short | None, None))
model("Recipe", name=Name, minutes=Count, steps=Names, ingredients=dict[str, str])
model("Ingredient", name=Name, amount=float | str, unit=(Literal["g", "ml"] | None, None))
model("Quiz", question=Short, options=Annotated[list[Short], Field(min_length=2, max_length=4)], right=Count)
model("Flashcards", cards=Annotated[list[tuple[Short, Short]], Field(max_length=3)])

# Agents
Search = model("Search", tool=Literal["search"], query=Short, limit=(Annotated[int, Field(ge=1, le=50)], 10))
Calculate = model("Calculate", tool=Literal["calculate"], expression=Short)
Finish = model("Finish", tool=Literal["finish"], answer=Short)
Action = Annotated[Search | Calculate | Finish, Field(discriminator="tool")]
model("Step", thought=Short, action=Action)
model("Plan", goal=Name, steps=Annotated[list[Action], Field(min_length=1, max_length=3)])
model("Thought", thought=Short, next=Literal["act", "answer"])
model("Handoff", to=Literal["billing", "support"], note=(Short | None, None))
model("Verdict", passed=bool, score=Stars, reasons=(Annotated[list[Short], Field(max_length=3)], []))
model("Critique", strengths=Names, weaknesses=Names, rewrite=(Short | None, None))
model("Routing", destination=Literal["a", "b", "c"], confidence=Score)
model("SubQuestions", questions=conlist(Short, min_length=1, max_length=4))
FileEdit = model(
    "FileEdit", path=Annotated[str, Field(pattern=r"^[a-z/]+\.py$")], line=Annotated[int, Field(ge=1)], text=Short
)
model("Patch", edits=Annotated[list[FileEdit], Field(max_length=2)])
model("Shell", command=Short, timeout_s=(Annotated[float, Field(gt=0, le=60)], 10.0))
model("Sql", query=Short, parameters=Annotated[list[str | int | float | bool | None], Field(max_length=3)])
model("Http", method=Literal["GET", "POST"], path=Slug, headers=(dict[str, str], {}), body=(str | None, None))
model("Memory", facts=Annotated[dict[Slug, Short], Field(max_length=3)])
Task = model("Task", id=Count, done=bool, depends=(Annotated[list[Count], Field(max_length=3)], []))
model("Tasks", tasks=Annotated[list[Task], Field(max_length=2)])
model("Call", name=Slug, arguments=dict[str, Any])
model("Weights", weights=Annotated[list[Score], Field(min_length=3, max_length=3)])
model("Vote", ballots=Annotated[dict[str, Literal[-1, 0, 1]], Field(max_length=3)])
Text_ = model("TextPart", type=Literal["text"], text=Short)
Image = model("ImagePart", type=Literal["image"], width=Count, height=Count)
model(
    "ChatMessage", role=Literal["user", "assistant"], content=str | Annotated[list[Text_ | Image], Field(max_length=2)]
)
model("Parts", parts=Annotated[list[Annotated[Text_ | Image, Field(discriminator="type")]], Field(max_length=3)])
model("Greeting", hello=Name, tone=(Literal["loud"] | None, None))

# Computers
model(
    "Host", name=Slug, ip=IPv4Address, ports=Annotated[list[Annotated[int, Field(ge=1, le=65535)]], Field(max_length=3)]
)
model("HostV6", name=Slug, ip=IPv6Address | IPv4Address)
model("LogLine", at=datetime, level=Literal["debug", "info", "error"], message=Short, extra=(dict[str, str | int], {}))
model("Release", version=Annotated[str, Field(pattern=r"^\d+\.\d+\.\d+$")], notes=(Short | None, None))
model("Commit", sha=Annotated[str, Field(pattern=r"^[0-9a-f]{7,40}$")], author=Name, at=datetime)
model("Issue", title=Name, labels=(Tags, []), assignee=(Slug | None, None), open=bool)
model("Build", id=Count, status=Literal["green", "red"], seconds=float)
model("Config", debug=(bool, False), workers=(Annotated[int, Field(ge=1, le=64)], 4), name=(Slug, "main"))
model("Environment", variables=Annotated[dict[str, str], Field(max_length=3)])
model("Metric", name=Slug, value=float, labels=(dict[str, str], {}))
model(
    "Cron",
    minute=Annotated[int, Field(ge=0, lt=60)] | Literal["*"],
    hour=Annotated[int, Field(ge=0, lt=24)] | Literal["*"],
)
Permission = model("Permission", read=bool, write=bool, execute=bool)
model("Access", users=Annotated[dict[Slug, Permission], Field(max_length=2)])
Column = model("Column", name=Slug, type=Literal["int", "text"], nullable=(bool, True))
model("TableSchema", table=Slug, columns=Annotated[list[Column], Field(min_length=1, max_length=3)])
model("Feed", url=AnyUrl, every=timedelta)
model("Token", id=Annotated[int, Field(ge=0, le=2**31 - 1)], text=Short)
model("Colour24", rgb=tuple[conint(ge=0, le=255), conint(ge=0, le=255), conint(ge=0, le=255)])
model("Hex", value=Annotated[str, Field(pattern=r"^#[0-9a-f]{6}$")])
model("Matrix", rows=Annotated[list[Annotated[list[float], Field(min_length=2, max_length=2)]], Field(max_length=2)])
model("Bits", bits=Annotated[list[Literal[0, 1]], Field(min_length=8, max_length=8)])
model("Retry", attempts=(Annotated[int, Field(ge=0, le=10)], 3), backoff=(Annotated[float, Field(ge=0)], 1.0))

# Health, science, school
model(
    "Patient",
    name=Name,
    born=date,
    allergies=(Annotated[list[Name], Field(max_length=3)], []),
    blood=Literal["A", "B", "0"],
)
Dose = model("Dose", drug=Name, mg=Annotated[float, Field(gt=0, le=5000)], times=Annotated[int, Field(ge=1, le=6)])
model("Prescription", patient=Name, doses=Annotated[list[Dose], Field(min_length=1, max_length=2)])
model("Vitals", pulse=conint(ge=20, le=250), pressure=tuple[conint(ge=40, le=250), conint(ge=20, le=150)])
model("Experiment", name=Name, runs=Annotated[list[dict[str, float]], Field(max_length=2)], ok=bool | None)
model("Sample", id=UUID, taken=datetime, ph=Annotated[float, Field(ge=0, le=14)])
model("Molecule", formula=Annotated[str, Field(pattern=r"^([A-Z][a-z]?\d{0,2}){1,6}$")], mass=Percent)
Grade = model("Grade", subject=Name, grade=Literal["A", "B", "C", "D", "F"])
model("Report", student=Person, grades=Annotated[list[Grade], Field(max_length=3)])
model("Exam", at=datetime, room=Annotated[str, Field(pattern=r"^[A-F]\d{3}$")], seats=Count)
model("Paper", title=Name, authors=Names, year=conint(ge=1600, le=2100), doi=(Short | None, None))
model("Star", name=Name, distance_ly=float, colour=Colour)
model("Sequence", bases=Annotated[str, Field(pattern=r"^[ACGT]{1,30}$")])
model("Range", low=int | None, high=int | None)
model("Complex", re=float, im=float)

# Media, travel, home
Song = model("Song", title=Name, seconds=Count, genres=(Tags, []))
model("Playlist", name=Name, songs=Annotated[list[Song], Field(max_length=2)])
model("Film", title=Name, year=int, cast=dict[str, Name], rating=(Score | None, None))
Flight = model(
    "Flight", number=Annotated[str, Field(pattern=r"^[A-Z]{2}\d{1,4}$")], origin=Code, destination=Code, leaves=datetime
)
model("Trip", legs=Annotated[list[Flight], Field(min_length=1, max_length=2)], hotel=(Name | None, None))
model("Booking", guest=Name, nights=conint(ge=1, le=60), breakfast=(bool, True), room=Literal["single", "double"])
model("Lamp", on=bool, colour=(Colour | None, None), brightness=Annotated[int, Field(ge=0, le=100, multiple_of=10)])
Thermostat = model("Thermostat", target=Annotated[float, Field(ge=5, le=30)], mode=Literal["heat", "cool", "off"])
model("Rooms", rooms=Annotated[dict[Slug, Thermostat], Field(max_length=2)])
model("Result", home=Count, away=Count, overtime=(bool, False))
model("League", teams=Names, table=dict[str, Count])
model(
    "Move",
    from_=Annotated[str, Field(pattern=r"^[a-h][1-8]$", alias="from")],
    to=Annotated[str, Field(pattern=r"^[a-h][1-8]$")],
)
model(
    "Board",
    squares=Annotated[
        list[Annotated[list[Literal["x", "o", ""]], Field(min_length=3, max_length=3)]],
        Field(min_length=3, max_length=3),
    ],
)
model("Advert", headline=Name, body=Short, budget=Money | Literal["unlimited"])
model("House", rooms=conint(ge=1, le=30), area=Annotated[float, Field(gt=0)], garden=bool, price=(Money | None, None))
model("Car", make=Name, doors=Literal[2, 4, 5], electric=bool, range_km=(Count | None, None))

# How it is written
model("Forbidding", config=ConfigDict(extra="forbid"), a=int, b=(str, "x"))
model("Allowing", config=ConfigDict(extra="allow"), a=int)
model("Titled", config=ConfigDict(title="A title", json_schema_extra={"examples": [{"a": 1}]}), a=int)
model("Described", a=Annotated[int, Field(description="x" * 500, examples=[1, 2], title="A")])
model("Umlauts", größe=Annotated[int, Field(alias="größe in cm")], straße=Name)
model("Quoted", value=Literal['say "hi"', "back\\slash", "new\nline", "tab\t"])
model("Empty")
model("AllOptional", a=(int | None, None), b=(str | None, None), c=(bool | None, None), d=(list[int] | None, None))
model("Deep", a=create_model("L1", b=(create_model("L2", c=(create_model("L3", d=(list[int], ...)), ...)), ...)))
model("Wide", **{f"field_{i}": (int | None, None) for i in range(40)})
model("ManyRequired", **{f"field_{i}": bool for i in range(40)})
model("BigEnum", value=Literal[tuple(f"choice {i}" for i in range(500))])
model("LongNames", **{f"{'very_' * 10}long_{i}": (int, 0) for i in range(5)})
model("UnionOfMany", value=int | float | str | bool | None | list[int] | dict[str, int])
model("UnionOfModels", value=Person | Address | Item)
model("NestedUnions", value=list[int | list[str | list[bool]]])
model("Tuple", pair=tuple[int, str], rest=tuple[bool, ...])
model("DictOfLists", value=dict[str, list[int]])
model("DictOfModels", value=Annotated[dict[str, Point], Field(max_length=2)])
model("ListOfDicts", value=Annotated[list[dict[str, str | None]], Field(max_length=2)])
model("Negative", value=Annotated[int, Field(lt=0)], small=Annotated[float, Field(gt=-1, lt=-0.5)])
model("Huge", value=Annotated[int, Field(ge=10**15, le=10**16)])
model("Exact", value=Literal[42], text=Literal["exactly this"], flag=Literal[True])
