"""Texts planned, drafted and cut: essays, explanations, summaries, scenes, letters."""

from convert.calibration import Conversation
from convert.texts.thought import BANKS, Thought, capital, listed
from convert.texts.topics import ARTICLES, LETTERS, SCENES, SUBJECTS, TOPICS
from convert.texts.worked import Dice, Maker, user

_READERS = (
    "a local newspaper",
    "a school magazine",
    "a debating club",
    "readers without special knowledge",
    "a newsletter for neighbours",
    "a class of sixteen-year-olds",
)


_BANKS = {
    **BANKS,
    "check": (
        "Let me read it once aloud, in my head.",
        "Does each sentence earn its place?",
        "One more look at length and tone.",
    ),
    "close": (
        "I think it can stand like that.",
        "Good enough to send; more polishing would only take the life out of it.",
        "That reads well. I'll write it out.",
        "Now the clean version.",
        "Yes, this is what I wanted to say.",
    ),
}
_ON_WORDS = (
    "carries the story.",
    "a detail, though one that explains something.",
    "needed for the background.",
    "could go if space is short.",
    "more colour than news.",
)
_ON_NUMBERS = (
    "a number; does it decide anything?",
    "figures, to be copied exactly if at all.",
    "the size of the matter stands here.",
    "exact, but perhaps too exact for so short a text.",
)


def essay(rng: Dice, size: int) -> Conversation:
    """For and against, an order for the points, a draft, and what is changed in it."""
    topic = rng.own(TOPICS)
    reader = rng.choice(_READERS)
    favours = rng.random() < 0.5
    pros = rng.sample(topic.pros, min(1 + size, len(topic.pros)))
    cons = rng.sample(topic.cons, min(1 + size, len(topic.cons)))
    mine, theirs = (pros, cons) if favours else (cons, pros)
    stand = topic.yes if favours else topic.no
    question = rng.choice(
        (
            (
                f"{topic.question} Write a short essay for {reader} that comes to the conclusion that "
                f"{stand}."
            ),
            (
                f"Please write an opinion piece for {reader}: {topic.question} It should argue that "
                f"{stand}, and be fair to the other side."
            ),
            (
                f"I need {rng.choice((150, 200, 250, 300, 350))} words or so for {reader}. "
                f"{topic.question} My view is that {stand}."
            ),
        )
    )
    t = Thought(rng, _BANKS).say(
        "What does the reader need here?",
        "Before writing, let me collect points on both sides.",
        "An essay with a side to take. Let me gather material first.",
        "Let me think about the readers before the arguments.",
    )
    t.say(
        f"It's for {reader}, so plain words, no footnotes, concrete pictures.",
        f"Since this goes to {reader}, examples will carry further than theory.",
    )
    t.gap().say(f"In support of the view that {stand}:").gap()
    for number, point in enumerate(mine, start=1):
        t.line(f"{number}. {point}")
        t.say(
            "Concrete, I like that one.",
            "That is more of an observation than an argument, but it sticks.",
            "Good for the middle part.",
            "This could be the opening as well.",
            "It needs no proof, everybody has seen it.",
            "Strong, though it should not come first.",
        )
    t.gap().say("And what would the other side say?").gap()
    for point in theirs:
        t.line(f"- {point}")
        t.say(
            "That is true and has to be granted.",
            "Fair. Leaving it out would look as if I were afraid of it.",
            "I can answer this one with the closing thought.",
            "A real cost; better to name it than to have it named by a reader.",
            "Not decisive, but it deserves a sentence.",
        )
    first, *rest = rng.sample(mine, len(mine))
    end = rng.choice(topic.ends)
    t.gap().say(
        "Order: open with a picture, then the strongest objection, then the rest of the case, and a "
        "way forward at the end.",
        "How to arrange it? The objection in the middle, so that the piece can end on its own view.",
        "If I list all pros and then all cons it reads like minutes. So weave them.",
    )
    t.gap().say("Opening sentence.").say(
        f'"{first}" Yes, that draws one in at once.',
        f'Maybe a question? "{topic.question}" Too dry. Rather: "{first}"',
        f'I could start with a definition, but nobody reads on after a definition. "{first}"',
    )
    grant = rng.choice(theirs)
    t.gap().say(
        f'Then the concession: "{grant}" It should sound honest, not like a trick.',
        f'For the other side I pick this: "{grant}"',
    )
    t.say(
        f'And the end: "{end}" That leaves the reader with something to do.',
        f'Last sentence: "{end}" Short enough to be remembered.',
    )
    links = [*rng.sample(("Besides, ", "What is more, ", "Then again, "), 2), "", ""]
    middle = " ".join(
        link + (point[0].lower() + point[1:] if link else point)
        for link, point in zip(rng.sample(links, len(rest)), rest, strict=True)
    )
    granted = rng.choice(
        ("To be fair: ", "The other side has a point. ", "Something must be granted. ")
    )
    joined = grant[0].lower() + grant[1:] if granted.endswith(": ") else grant
    held = rng.choice(
        (
            f"All the same, I think that {stand}.",
            f"Weighing it all, {stand}.",
            f"And yet, on balance, {stand}.",
        )
    )
    text = f"{first} {middle}".strip() + f"\n\n{granted}{joined}\n\n{held} {end}"
    n_words = len(text.split())
    t.gap().say(
        f"Together that is about {n_words} words. Does it flow? The step from the concession back "
        f'to the view needs a hinge: "{held}"'
    )
    if size > 2:
        t.say(
            "I had thought of statistics, but I have none that I could vouch for, so none go in.",
            "A quotation would decorate it, but an invented one is worse than none.",
            "Should I soften the verdict? No, an opinion piece may have an opinion.",
        )
    t.turn("close")
    return Conversation("prose", (user(question),), t.text, text)


def explanation(rng: Dice, size: int) -> Conversation:
    """Something explained for somebody, with the usual mistake met on the way."""
    subject = rng.own(SUBJECTS)
    reader, tone = rng.choice(
        (
            ("a ten-year-old", "short sentences and the picture first"),
            ("my grandmother, who is curious about everything", "friendly, without jargon"),
            ("a beginner in the subject", "the terms, but each of them explained"),
            ("an adult who was bad at science at school", "calm, one step after the other"),
            ("a visitor of a museum, on a panel", "compact and exact"),
        )
    )
    question = rng.choice(
        (
            f"Explain {subject.name} to {reader}.",
            f"Can you explain {subject.name}? It's for {reader}.",
            f"Write a few sentences for {reader} on {subject.name}.",
        )
    )
    facts = [subject.facts[k] for k in sorted(rng.sample(range(6), min(2 + size, 6)))]
    t = (
        Thought(rng)
        .turn("open")
        .say(f"The topic: {subject.name}. The reader: {reader}; so {tone}.")
    )
    t.gap().say(f"The core in one sentence: {subject.core}")
    t.say(
        "If only that is understood, it was worth it.",
        "Everything else hangs on this.",
    )
    t.gap().say("What belongs to it?").gap()
    for fact in subject.facts:
        t.line(f"- {fact}")
        if fact in facts:
            t.say(
                "Needed.",
                "Keep.",
                "Yes, a step in the chain.",
                "In.",
                "This one explains the most.",
            )
        else:
            t.say("Leave out, it leads away.", "Interesting, but too much here.", "Skip.")
    t.gap().say(
        f"A common belief is that {subject.belief}. In fact, {subject.truth}. I should meet it, but "
        "without lecturing."
    )
    t.say(f'As a picture: "{subject.picture}"').turn("doubt", chance=0.6)
    t.say(
        "A comparison always limps somewhere; this one limps only at the edges.",
        "Does the picture mislead? Not in the point that matters.",
    )
    t.gap().say(
        "Order: the core, the chain of steps, the misunderstanding, the picture last.",
        "I start with the picture and let the steps follow.",
    ).turn("close")
    parts = [subject.core, *facts]
    truth = f"Many people believe that {subject.belief}, but {subject.truth}."
    if rng.random() < 0.5:
        text = f"{' '.join(parts)}\n\n{truth} {subject.picture}"
    else:
        text = f"{subject.picture} {' '.join(parts)}\n\n{truth}"
    return Conversation("science", (user(question),), t.text, text)


def summary(rng: Dice, size: int) -> Conversation:
    """A report cut to some sentences: what is essential, what is ornament."""
    article = rng.own(ARTICLES)
    n = min(len(article.essence), 1 + size)
    wanted = {1: "one sentence", 2: "two sentences", 3: "three sentences", 4: "four sentences"}[n]
    request = rng.choice(
        (
            f"Summarize the following text in {wanted}.",
            f"Please boil this down to {wanted}, without comment.",
            f"What does this report say? {capital(wanted)} at most.",
        )
    )
    sentences = article.text.replace("'They", "They").split(". ")
    t = (
        Thought(rng)
        .turn("open")
        .say(
            f"The text has {len(article.text.split())} words; {wanted} must hold what a reader would "
            "miss."
        )
    )
    t.gap().say("Going through it:").gap()
    for number, sentence in enumerate(sentences[: 3 + 2 * size], start=1):
        remarks = _ON_NUMBERS if any(c.isdigit() for c in sentence) else _ON_WORDS
        t.line(f'{number}. "{" ".join(sentence.split()[:7])} ...": {t.pick(*remarks)}')
    t.gap().say(
        f"What can go: {listed(article.trifles)}. They are nice to read, but nothing depends on "
        "them."
    )
    t.gap().say("Draft, sentence by sentence:").gap()
    for sentence in article.essence[:n]:
        t.line(f"- {sentence}")
    text = " ".join(article.essence[:n])
    t.gap().say(
        f"That is {len(text.split())} words. Are the numbers those of the text? I compare them one "
        "by one; yes."
    ).turn("doubt", chance=0.4).say(
        "Names are spelled as in the original.",
        "No opinion of mine has crept in.",
        "The order follows importance, which is what a summary should do.",
    )
    t.turn("close")
    return Conversation("prose", (user(f"{request}\n\n{article.text}"),), t.text, text)


def scene(rng: Dice, size: int) -> Conversation:
    """A place described by a few details, chosen by sense and cut."""
    place = rng.own(sorted(SCENES))
    details = SCENES[place]
    chosen = [details[k] for k in sorted(rng.sample(range(7), min(3 + size, 6)))]
    tone = rng.choice(("quiet", "slightly comic", "unsentimental", "attentive", "spare"))
    question = rng.choice(
        (
            f"Describe {place} in a {tone} tone, {len(chosen)} sentences.",
            f"Write a paragraph of {len(chosen)} sentences on {place}. The tone should be {tone}.",
            f"{capital(place)}: give me a {tone} paragraph, no plot, just the place.",
        )
    )
    t = Thought(rng, _BANKS).say(
        "What would one notice first? Not the view; sounds and hands.",
        "No adjectives like beautiful. Things that move, things that are worn.",
        "A place is best shown by what people leave lying about.",
        "Let me list details and see which of them belong together.",
    )
    t.gap()
    for detail in details:
        t.line(f'"{detail}"')
        if detail in chosen:
            t.say("Keep it.", "This one, yes.", "Good, it moves.", "In, for the sound of it.")
        else:
            t.say(
                "Too pretty.", "One too many of that sort.", "No room for it.", "Perhaps elsewhere."
            )
    t.gap().say(
        f"{len(chosen)} remain. The rhythm: long ones between short ones.",
        "In this order the eye goes from the far to the near.",
    ).say(f"Is it {tone}? I think so; nothing explains itself.").turn("close")
    return Conversation("prose", (user(question),), t.text, " ".join(chosen))


def letter(rng: Dice, size: int) -> Conversation:
    """A blunt message said in another tone, with versions that are thrown away."""
    blunt, tone, versions = rng.own(LETTERS)
    question = rng.choice(
        (
            f'Rewrite this message, {tone}: "{blunt}"',
            f'How would you say this better ({tone})? "{blunt}"',
            f'Please turn "{blunt}" into a message {tone}. Three sentences or so.',
        )
    )
    chosen = rng.choice(versions)
    other = next(one for one in versions if one != chosen)
    t = Thought(rng, _BANKS).say(
        "What is the message behind the temper?",
        "The wish is legitimate, the wording closes doors.",
        "First the facts, then what is wanted, then the tone.",
    )
    t.say(
        f'"{blunt}" says what is wrong but hardly what should happen.',
        f'In "{blunt}" the reader hears a reproach first.',
    )
    t.gap().say(f"One version: {other}")
    t.say(
        "Hmm. It would do, but it is a little stiff.",
        "Not bad. Could it be more direct?",
        "Possible. Let me try once more and compare.",
    )
    t.gap().say(f"Another: {chosen}")
    t.say(
        "It names the matter, asks for something definite, and leaves the other a way to agree.",
        "That one I would like to receive myself, if I had to receive one of them.",
        "Friendly without giving anything up. This is the better one.",
    )
    if size > 1:
        t.gap().say(
            "Nothing is promised in it that was not in the original, and no new facts beyond "
            "placeholders that the sender can correct.",
            "Should there be an apology? Only where there is something to apologise for.",
        )
    t.turn("close")
    return Conversation("prose", (user(question),), t.text, chosen)


MAKERS: tuple[Maker, ...] = (essay, summary, scene, letter)
