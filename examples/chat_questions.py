"""Questions for a chat model, made from templates: what a draft for it is distilled on.

Nothing here is taken from a data set. Of ten thousand draws some 6300 differ.
"""

from __future__ import annotations

import random

TOPICS = """photosynthesis|gravity|the water cycle|black holes|inflation in economics|supply and demand|vaccines
antibiotics|the human heart|the immune system|earthquakes|volcanoes|tides|the seasons|evolution|DNA|electricity
magnets|batteries|computers|the internet|machine learning|neural networks|encryption|databases|operating systems
compilers|recursion|prime numbers|fractions|probability|calculus|Pythagoras' theorem|statistics|democracy|human rights
the printing press|the Industrial Revolution|ancient Rome|ancient Egypt|the Silk Road|the Renaissance|the Moon landing
the French Revolution|climate change|renewable energy|solar panels|wind turbines|nuclear power|recycling|rainforests
coral reefs|bees|whales|dogs|cats|horses|elephants|penguins|dinosaurs|trees|mushrooms|bread|coffee|tea|chocolate
cheese|pasta|chess|football|swimming|running|yoga|meditation|sleep|stress|friendship|teamwork|leadership
public speaking|time management|budgeting|insurance|credit cards|taxes|investing|jazz|classical music|painting
photography|poetry|novels|theatre|architecture|bridges|trains|aeroplanes|bicycles|electric cars|satellites
the Solar System|Mars|comets|light|sound|colour|heat|water|oxygen|salt|gold|plastic|glass|paper|languages|grammar
spelling|teaching|museums|libraries|cities|farming|fishing"""
PLACES = """Paris|London|Tokyo|Rome|Cairo|Sydney|New York|Berlin|India|Brazil|Canada|Kenya|Norway|Mexico|the Alps
the Amazon|the Sahara|Iceland|Greece|Peru|Vietnam|Scotland|Hawaii|Morocco"""
SKILLS = """cook rice|bake bread|learn a new language|grow tomatoes|save money|fall asleep faster|write a cover letter
prepare for a job interview|train a puppy|start a blog|clean a kitchen|pack a suitcase|study for an exam
read more books|play the guitar|fix a flat tyre|make new friends|eat more vegetables|start running
plan a birthday party|give a speech|organise my desk|choose a laptop|learn to swim|remember names|stay motivated
write a short story|make a good cup of tea|speak in public|manage my time|lose weight|learn programming|build a shelf
paint a room|plan a trip|take better photos"""
CHARACTERS = """a lonely robot|a brave mouse|an old sailor|a young inventor|a talking tree|two best friends
a lost dragon|a shy teacher|a clever fox|a tired astronaut|a kind giant|a girl who could fly|a boy and his dog
a forgotten king|a curious cat|a detective in a small town|a baker who finds a map|a scientist on Mars
a musician without an instrument|a family at the sea"""
PEOPLE = "Anna|Ben|Carla|David|Emma|Farid|Grace|Hugo|Ines|Jack|Kim|Liam|Maya|Noah|Olga|Paul|Rosa|Sam|Tina|Yuki"
THINGS = "apples|books|marbles|stamps|cookies|pencils|cards|shells|oranges|eggs|balloons|coins|flowers|toys|stickers"
CODE_TASKS = """adds two numbers|reverses a string|checks whether a number is prime|counts the vowels in a string
sorts a list|finds the largest number in a list|computes the factorial of a number|removes duplicates from a list
reads a file line by line|computes the average of a list|checks whether a word is a palindrome
converts Celsius to Fahrenheit|counts words in a text|returns the first n Fibonacci numbers|merges two dictionaries
finds the longest word in a sentence|flattens a nested list|computes the greatest common divisor
generates a random password|capitalises every word|sums the digits of a number"""
PAIRS = """cats and dogs|tea and coffee|cities and villages|books and films|summer and winter|trains and planes
Python and Java|online and classroom learning|email and letters|electric and petrol cars|running and cycling
gold and silver|rivers and lakes|butter and oil|renting and buying a home|plants and animals|viruses and bacteria
weather and climate|mass and weight|speed and velocity|acids and bases|wind and solar power|novels and poems
violins and guitars|lions and tigers"""

ABOUT_TOPICS = """What is {topic}?|Explain {topic} in simple terms.|Tell me about {topic}.|Why is {topic} important?
What are the main facts about {topic}?|Write a short paragraph about {topic}.|Give me five facts about {topic}.
How would you explain {topic} to a child?|What is the history of {topic}?|Write a poem about {topic}.
What are the advantages and disadvantages of {topic}?|List three common myths about {topic}.
Write a quiz about {topic}.|I am writing an essay about {topic}. Can you suggest an outline?
How does {topic} affect our daily lives?|Give me a summary of {topic} in three sentences.
What should a beginner know about {topic}?|Can you recommend ways to learn more about {topic}?
Write an introduction for a talk on {topic}."""
ABOUT_OTHERS = """How do I {skill}?|I want to {skill}. What should I do first?|Give me some tips to {skill}.
Write a step-by-step guide to {skill}.|What are common mistakes when people try to {skill}?
My friend wants to {skill}. What advice would you give?|What should I see in {place}?
Plan a three-day trip to {place}.|What is {place} known for?|Write a postcard from {place}.
What is the best time of year to visit {place}?|Write a travel blog post about {place}.|Describe the food of {place}.
Write a short story about {character}.|Describe {character} in a few sentences.
Write the first paragraph of a novel about {character}.|Write a dialogue between {character} and {other}.
Invent a title and a plot for a film about {character}.|Write a Python function that {code}.
Show me how to write code that {code}, and explain it.|What is the difference between {pair}?|Compare {pair}.
Which do you prefer, {pair}?|Make a list of similarities between {pair}.
Write an email to my boss asking for {number} days off.|Write a polite email to {person} about our meeting on {topic}.
Write a thank-you note to {person}, who taught me about {topic}.|Pretend to be {character}. Tell me about your day.
Imagine that you live in {place}. What do you do in the morning?|Give me {few} ideas for a project about {topic}.
Rewrite this sentence more politely: {person}, give me the {thing}!|Translate to French: I have {number} {thing}.
Correct the grammar: {person} have went to {place} for buy {thing}.|What rhymes with {thing}?|Hello! Who are you?
Write a product description for {thing}.|Classify these as living or not living: {thing}, {character}, {topic}.
Give me a dinner recipe with {number} ingredients.|Write a slogan for a shop that sells {thing}."""
MATHS = """{person} has {a} {thing}. {friend} gives {person} {b} more. How many {thing} does {person} have now?
{person} had {large} {thing} and gave {b} of them to {friend}. How many are left?
A box holds {a} {thing}. How many {thing} are there in {b} boxes?
{person} buys {a} {thing} for ${b} each. How much does {person} pay in total?
{person} reads {a} pages a day. How many pages does {person} read in {b} days?
A train travels {large} miles in {few} hours. What is its average speed?
{person} shares {large} {thing} equally among {few} friends. How many does each friend get?
{person} earns ${a} an hour and works {b} hours a week. How much does {person} earn in {few} weeks?
There are {a} {thing} on the table. {person} takes {few} and {friend} adds {b}. How many are on the table now?
{person} has twice as many {thing} as {friend}. {friend} has {a}. How many do they have together?
A shirt costs ${large} and is sold at a discount of {tens}%. What is the new price?
{person} is {a} years old. {friend} is {few} years older. How old will {friend} be in {b} years?
What is {a} times {b}?|What is {large} plus {b}?|What is {large} divided by {few}?|What is {tens}% of {large}?
If 3 {thing} cost ${a}, how much do {number} {thing} cost? Show your work.
{person} ran {few} miles on Monday, {a} miles on Tuesday and {b} miles on Wednesday. How many in all? Think stepwise."""


def choices(text: str) -> list[str]:
    """The parts of a list above."""
    return [part.strip() for part in text.replace("|", "\n").splitlines()]


def make_question(generator: random.Random) -> str:
    """One question: a third about topics, a third about other things, a third sums in words."""
    template = generator.choice(choices(generator.choice((ABOUT_TOPICS, ABOUT_OTHERS, MATHS))))
    person, friend = generator.sample(choices(PEOPLE), 2)
    character, other = generator.sample(choices(CHARACTERS), 2)
    return template.format(
        topic=generator.choice(choices(TOPICS)),
        place=generator.choice(choices(PLACES)),
        skill=generator.choice(choices(SKILLS)),
        thing=generator.choice(choices(THINGS)),
        code=generator.choice(choices(CODE_TASKS)),
        pair=generator.choice(choices(PAIRS)),
        person=person,
        friend=friend,
        character=character,
        other=other,
        number=generator.randint(3, 12),
        few=generator.randint(2, 6),
        a=generator.randint(3, 40),
        b=generator.randint(2, 20),
        large=generator.randint(30, 300),
        tens=10 * generator.randint(1, 8),
    )
