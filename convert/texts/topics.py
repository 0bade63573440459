"""Matter for essays, explanations, scenes, summaries and letters, written for this project."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Topic:
    """A question that reasonable people differ on, with what speaks for and against."""

    question: str
    yes: str
    no: str
    pros: tuple[str, ...]
    cons: tuple[str, ...]
    ends: tuple[str, ...]


TOPICS = (
    Topic(
        "Should a small town close its market square to cars?",
        "the square should be closed",
        "the square should stay open to cars",
        (
            "A square without parked cars can be crossed by a child alone; that changes who uses it.",
            (
                "Shopkeepers tend to overestimate how many of their customers drive, since drivers are "
                "the ones who complain."
            ),
            (
                "Stalls, benches and trees earn nothing directly, yet they are the reason to linger, and "
                "people who linger buy."
            ),
            "Noise falls at once, and with it the need to shout over one's own coffee.",
            "Paving lasts longer when nobody turns two tonnes of steel on it all day.",
        ),
        (
            (
                "The baker's deliveries, the wedding party and the man with the bad hip all need to get "
                "close to the door."
            ),
            (
                "Cars that are banned here do not dissolve; they circle through the side streets, past "
                "the school."
            ),
            "In winter an empty square is merely empty, and a bench in the rain attracts nobody.",
            (
                "A village shop lives on the few who stop for two minutes, and two minutes need a place "
                "to stop."
            ),
        ),
        (
            (
                "A trial over one summer costs some flower pots and settles more than another year of "
                "meetings."
            ),
            "Opening the square for deliveries until ten would answer most of the objections.",
        ),
    ),
    Topic(
        "Should schools teach handwriting with a pen in the age of keyboards?",
        "handwriting deserves its hours",
        "the hours would be better spent otherwise",
        (
            "Forming a letter by hand fixes its shape in memory in a way that pressing a key does not.",
            "Notes taken by hand are shorter, because the hand is slow, and so the head must choose.",
            (
                "A pen needs no battery, no update and no password, which is worth something in a "
                "classroom of thirty."
            ),
            "Slowness is a skill of its own; few school hours are left that practise it.",
        ),
        (
            "Children whose fingers obey them late lose years to a skill that they will rarely need.",
            "Legible print is enough for a form or a birthday card; joined script is ornament.",
            "Ten minutes a day of typing would spare most adults a lifetime of hunting for keys.",
            "What a teacher cannot read cannot be marked fairly, however much effort went into it.",
        ),
        (
            "Perhaps the quarrel is about hours and not about pens: two short lessons a week would do.",
            "A pupil who can do both will choose sensibly, and one who can do only one cannot choose.",
        ),
    ),
    Topic(
        "Is it better to repair a washing machine than to replace it?",
        "repairing is usually better",
        "replacing is often the wiser choice",
        (
            (
                "Most failures concern a pump, a belt or a seal, parts that cost less than a week's "
                "groceries."
            ),
            "Making a new machine takes far more material and energy than a repairer's visit.",
            "One knows the faults of the old machine; those of a new one are a surprise.",
            "A trade that repairs keeps money in the town and knowledge in people's hands.",
        ),
        (
            "An old drum may use twice the water, and the bill arrives every year.",
            "When the bearing goes, the labour alone can exceed half of the price of a new machine.",
            "Spare parts for a model of fifteen years ago are found by luck, not by catalogue.",
            "A household with a baby cannot wait ten days for a gasket.",
        ),
        (
            (
                "A simple rule serves well: below half of the price of a new one, and before its twelfth "
                "year, repair it."
            ),
            (
                "The best repair is the one that the maker foresaw; that is a question for the law and "
                "not for the laundry room."
            ),
        ),
    ),
    Topic(
        "Should public libraries abolish fines for late returns?",
        "fines should go",
        "fines should stay",
        (
            "A fine of three euros is nothing to one reader and a reason to stay away to another.",
            "Collecting small coins costs staff time that is worth more than the coins.",
            "Where fines were dropped, long-lost books often came back, together with their readers.",
            "A reminder by text message does more for punctuality than the threat of a penny a day.",
        ),
        (
            "A date that has no consequence is a suggestion, and the next reader waits in vain.",
            "The fines pay for the replacement of what never returns.",
            "Children learn there that a borrowed thing belongs to everyone, which means also to others.",
        ),
        (
            "Blocking further loans until the book is back keeps the incentive and drops the bill.",
            "Libraries lend trust along with paper; now and then they must write some of it off.",
        ),
    ),
    Topic(
        "Should a company let its employees choose their own working hours?",
        "hours should be free within a frame",
        "common hours serve everyone better",
        (
            "An early riser at her desk at six and a night owl at ten both work at their best.",
            "Parents stop apologising for the hour at which a nursery closes.",
            "Results are easier to discuss once presence no longer stands in for them.",
            "The trains are emptier at half past nine, and so are the tempers.",
        ),
        (
            (
                "A question that could be answered in a minute waits for three hours until its owner "
                "gets up."
            ),
            "Those who come late are seen less, and what is not seen is rarely promoted.",
            "Without a common end to the day, the day tends not to end.",
            "Newcomers learn by overhearing, and an empty room has nothing to say.",
        ),
        (
            "A core from ten to two, with freedom around it, gives most of both.",
            "Whatever is agreed should be written down, or the loudest will decide it daily.",
        ),
    ),
    Topic(
        "Are zoos still justified?",
        "good zoos are justified",
        "zoos can no longer be justified",
        (
            (
                "Several species, among them Przewalski's horse, survived only because some were kept in "
                "captivity."
            ),
            "A child who has smelled an elephant knows something that no film conveys.",
            "Veterinary knowledge gained on tame animals helps the wild ones.",
            "Breeding programmes are insurance: dull while nothing happens, priceless afterwards.",
        ),
        (
            "A wolf that walks the same ten metres all day teaches visitors something wrong about wolves.",
            "Most of the animals on display belong to species that are not threatened at all.",
            "The money that keeps one panda would protect whole forests where pandas live.",
            "Being looked at is not a neutral condition for a shy animal.",
        ),
        (
            "The word covers too much: a breeding station and a row of cages should not share it.",
            "The test is simple to state: would the species be worse off if this place closed?",
        ),
    ),
    Topic(
        "Should we keep changing the clocks twice a year?",
        "the change should be kept",
        "the change should be abolished",
        (
            (
                "With one time for the whole year either the winter mornings or the summer evenings are "
                "dark at the wrong end."
            ),
            "Long light evenings bring people outdoors after work, for half of the year at least.",
            "The change has been routine for decades, and most devices adjust themselves.",
        ),
        (
            "For some days after the spring change, sleep is short and accidents are more frequent.",
            "The savings of energy that once justified it are too small to be measured well.",
            "Cows, infants and night trains do not read the decree.",
            "Twice a year every oven in the house tells a different truth.",
        ),
        (
            "Abolishing it is easy; agreeing which of the two times should remain is the real dispute.",
            "Neighbouring countries must move together, or the border becomes a time zone.",
        ),
    ),
    Topic(
        "Should a beginner learn to cook from recipes or by improvising?",
        "recipes come first",
        "improvising teaches more",
        (
            "A recipe is somebody else's experience at the price of reading it.",
            "Quantities matter most where one cannot taste on the way, as in a cake.",
            "Following exactly, for once, shows what a dish is supposed to be.",
            "Whoever has cooked ten soups from books sees what they share.",
        ),
        (
            "Tomatoes differ, stoves differ, and only tasting tells what is missing today.",
            "Fear of doing it wrong is the most common ingredient of a dull dinner.",
            "What is in the larder is seldom what stands in the book.",
            "A cook who knows why onions go in first needs fewer lists.",
        ),
        (
            "Learn one recipe by heart, then change one thing at a time; that is both.",
            (
                "Salt, acid, fat and heat explain more than a shelf of books, but somebody has to say so "
                "first."
            ),
        ),
    ),
    Topic(
        "Is travelling by night train a sensible alternative to short flights?",
        "night trains make sense",
        "flights remain the better choice",
        (
            "One sleeps through the distance and arrives in the middle of the city at breakfast time.",
            (
                "Per passenger, a train on an electrified line causes a small part of a flight's "
                "emissions."
            ),
            "No belt to take off, no litre of liquids to defend, no bus across the tarmac.",
            "A hotel night is saved, which the comparison of fares tends to forget.",
        ),
        (
            "A couchette for four with three strangers is not everybody's idea of sleep.",
            "One missed connection, and the morning meeting happens without you.",
            "Tickets are often dearer than a flight, since airlines pay no tax on their fuel.",
            "Sleeping cars are old, few, and booked out weeks before the holidays.",
        ),
        (
            (
                "For six to twelve hours of track the night train is hard to beat; beyond that it is a "
                "hobby."
            ),
            "More coaches would do more for it than more speeches.",
        ),
    ),
    Topic(
        "Should cities plant fruit trees in public parks?",
        "fruit trees belong in parks",
        "parks should plant other trees",
        (
            "An apple within reach is the shortest lesson on where food comes from.",
            "Blossom in April feeds bees and moods alike.",
            "Neighbours who prune together in February know each other's names by March.",
            "Old local varieties survive where people are allowed to taste them.",
        ),
        (
            "Fallen plums are a feast for wasps and a hazard for the ankles of joggers.",
            "Fruit trees want pruning every year, and a park budget wants trees that want nothing.",
            "Beside a busy road the harvest collects what the traffic leaves behind.",
            "They stay small and give less shade than a lime or a plane tree.",
        ),
        (
            (
                "A grove at the quiet end of the park, with a tool shed and a group that cares for it, "
                "avoids nearly all of the trouble."
            ),
            "Walnuts and hazels are a fair compromise: no wasps, and squirrels clean up.",
        ),
    ),
)


@dataclass(frozen=True, slots=True)
class Subject:
    """Something to explain: in short, the facts in order, what is often believed, a picture."""

    name: str
    core: str
    facts: tuple[str, ...]
    belief: str
    truth: str
    picture: str


SUBJECTS = (
    Subject(
        "how soap removes grease",
        "Soap molecules have one end that clings to water and another that clings to fat.",
        (
            (
                "Water alone runs off grease, because water molecules hold on to each other and not to "
                "fat."
            ),
            "In the sink, the fat-loving ends dig into a drop of grease from all sides.",
            "Their water-loving ends stick out, so the drop looks like water to the water around it.",
            "Such wrapped drops are called micelles, and they float away with the rinse.",
            "Rubbing helps, as it breaks a film of grease into small drops.",
            "Hard water holds calcium, which binds soap and leaves a grey scum.",
        ),
        "soap kills all dirt",
        "it mostly carries dirt away, though it also breaks the fatty envelope of some viruses",
        "It is like a guide who speaks two languages and takes the lost tourist by the hand.",
    ),
    Subject(
        "why there are tides",
        "The Moon pulls the near side of the Earth more strongly than the far side.",
        (
            "Gravity weakens with distance, and the Earth is wide enough for that to matter.",
            "The water on the near side is pulled ahead, and the water on the far side is left behind.",
            "So there are two bulges, and a place passes through both in a little over a day.",
            "The Sun does the same, at a bit less than half of the strength.",
            "At new and full moon both act along one line, which makes spring tides.",
            (
                "The shape of coasts and basins decides whether the sea rises by centimetres or by ten "
                "metres."
            ),
        ),
        "the Moon simply lifts the water below it",
        "the difference of the pull across the Earth is what counts, hence two high tides and not one",
        "Think of three runners tied together loosely, each pulled a little harder than the one "
        "behind.",
    ),
    Subject(
        "how yeast makes bread rise",
        "Yeast eats sugar and breathes out carbon dioxide, which the dough traps.",
        (
            "Flour holds starch, and enzymes cut it into sugars that yeast can use.",
            "Kneading links the flour's proteins into gluten, a stretchy net.",
            "Bubbles of gas grow inside that net, so the dough swells.",
            "Warmth speeds the yeast up; above some fifty degrees it dies.",
            "A slow rise in the cold gives more taste, as acids and alcohols have time to form.",
            "In the oven the gas expands once more before the crumb sets.",
        ),
        "more yeast makes better bread",
        "it makes faster bread, which often tastes flat",
        "It works like thousands of tiny bellows inside a rubber sponge.",
    ),
    Subject(
        "why metal feels colder than wood",
        "Metal conducts heat away from the hand faster than wood does.",
        (
            "In a room both have the same temperature, some twenty degrees.",
            "The skin is warmer, at over thirty, so heat flows out of the hand.",
            "In metal, electrons carry that heat off at once, so the surface stays cool.",
            "Wood passes it on slowly; its surface warms under the hand and the flow dies down.",
            "Nerves report the temperature of the skin itself, not that of the thing.",
            "In a sauna it is the reverse: a metal nail burns where the bench is bearable.",
        ),
        "metal is colder by nature",
        "a thermometer shows the same for both",
        "It is the difference between a crowd leaving by a wide gate and by a turnstile.",
    ),
    Subject(
        "how a vaccine protects",
        "It shows the immune system a harmless part of a germ, so that it is ready for the real one.",
        (
            "White blood cells carry many different receptors, and a few of them fit by chance.",
            "Those that fit multiply and make antibodies.",
            "It takes one to two weeks until enough of them are there.",
            "Some remain for years as memory cells.",
            "When the germ itself comes, they answer within days and often before one feels ill.",
            "A booster repeats the lesson and makes the memory last.",
        ),
        "a vaccine works at once",
        "the body needs about two weeks to build up protection",
        "It is a fire drill: nobody gets burnt, but everyone knows the way afterwards.",
    ),
    Subject(
        "how a refrigerator makes cold",
        "It does not make cold; it pumps heat from the inside to the outside.",
        (
            "A liquid takes up heat when it evaporates, as sweat does on the skin.",
            "Inside the wall of the fridge a coolant evaporates at low pressure and takes heat with it.",
            "A compressor squeezes the vapour, which makes it hot.",
            "In the grid on the back it gives that heat to the kitchen and becomes liquid again.",
            "A narrow valve lets the pressure drop, and the round begins anew.",
            "The kitchen therefore gets warmer by the heat removed plus the electricity used.",
        ),
        "an open fridge cools the kitchen",
        "it heats the kitchen, as the pump's work is added to what it moves",
        "Picture a bucket brigade that carries warm water out of a boat.",
    ),
    Subject(
        "why leaves turn yellow in autumn",
        "The green chlorophyll is broken down, and yellow pigments that were there all along show.",
        (
            "Chlorophyll holds nitrogen, which is too precious to throw away.",
            "Shorter days tell the tree to take it back into twigs and roots.",
            "Carotenoids remain in the leaf for a while and make it yellow or orange.",
            "Red comes from anthocyanins, which some trees make afresh in autumn.",
            "A layer of cork grows at the base of the stalk, and then wind does the rest.",
            "Sunny days with cool nights give the strongest reds.",
        ),
        "frost paints the leaves",
        "the length of the day starts it, and early frost rather spoils the colours",
        "It is like packing away the green table cloth and seeing the wood again.",
    ),
    Subject(
        "how a satellite navigator finds its place",
        "It measures how long signals of several satellites have been on their way.",
        (
            "Each satellite sends its position and the exact time.",
            "Light covers thirty centimetres in a billionth of a second, so clocks must be very good.",
            (
                "One distance puts the receiver on a sphere around the satellite; three narrow it down to "
                "a point near the ground."
            ),
            "A fourth satellite is needed because the clock in the receiver is a cheap one.",
            (
                "Relativity makes the clocks in orbit gain about 38 microseconds a day, which is "
                "corrected."
            ),
            "Tall houses reflect signals, and then the arrow jumps into the next street.",
        ),
        "the device sends something to the satellites",
        "it only listens; even with millions of users the satellites notice nothing",
        "It is like judging the distance of a thunderstorm by counting seconds, four storms at once.",
    ),
)


@dataclass(frozen=True, slots=True)
class Article:
    """A short report to summarize, with what matters in it."""

    text: str
    essence: tuple[str, ...]
    trifles: tuple[str, ...]


ARTICLES = (
    Article(
        "After eleven years the ferry across the Larn is to run again. The council of Oster voted "
        "nine to four on Tuesday to buy a used electric boat for 340,000 euros. It carries twelve "
        "passengers and six bicycles and is meant to cross every twenty minutes from April to "
        "October. The old ferry was given up when its engine failed and no spare parts could be "
        "found. Since then pupils from the western bank have travelled nine kilometres over the "
        "motorway bridge. Critics on the council called the price too high and asked for a study. "
        "The mayor replied that the last study had cost almost as much as a pier. A crossing will "
        "cost one euro, and children will travel free. The first boat is expected in spring, if the "
        "landing on the eastern bank, which ducks have taken over, can be repaired by then.",
        (
            "Oster's council decided by nine votes to four to buy an electric ferry for 340,000 euros.",
            (
                "It will cross the Larn every twenty minutes from April to October, for one euro, free "
                "for children."
            ),
            (
                "The old ferry stopped eleven years ago, and pupils have since made a detour of nine "
                "kilometres."
            ),
            "Critics think it too dear; the start also depends on repairs to a landing.",
        ),
        ("the ducks", "the mayor's joke about studies", "the number of bicycles"),
    ),
    Article(
        "A choir of retired miners from Hollenau has become an unlikely success. What began as a "
        "Friday habit in the back room of a bakery fills halls of eight hundred seats today. The "
        "twenty-six singers, the youngest of them sixty-one, perform work songs that were never "
        "written down. Their leader, Edda Brandt, a former accountant, spent three winters visiting "
        "care homes with a recorder to collect the tunes. Seventy-four songs were saved in this "
        "way, some in a dialect that fewer than a hundred people speak. A university now wants to "
        "archive them. The choir agreed under one condition: anyone may sing the songs without "
        "asking. A record company that offered money for exclusive rights was turned down. 'They "
        "were nobody's when we found them,' says Brandt, 'and they should stay nobody's.'",
        (
            "A choir of retired miners from Hollenau, once a Friday habit, now fills large halls.",
            (
                "Its leader Edda Brandt collected seventy-four unwritten work songs from old people, some "
                "in a dying dialect."
            ),
            "A university will archive them on condition that everyone may sing them freely.",
            "The choir refused to sell exclusive rights.",
        ),
        ("the bakery's back room", "the leader's former profession", "the age of the youngest"),
    ),
    Article(
        "Engineers in Varde have tested road markings that glow after dark. Over two winters, lines "
        "on four kilometres of an unlit country road were painted with a pigment that stores "
        "daylight. On clear days the glow lasted about six hours, on overcast ones barely two. The "
        "number of vehicles that strayed over the line fell by a third in comparison with a similar "
        "road nearby. Yet the paint wears off faster than the usual one and costs five times as "
        "much. Snow ploughs removed a quarter of it in the first January. The team now mixes the "
        "pigment into a tougher plastic and wants to use it in bends alone, where it would matter "
        "most. Residents were pleased on the whole, though one farmer reported that his cows "
        "refused to cross the shining stripe until it was covered with straw.",
        (
            "In Varde, glowing road markings were tested on four kilometres for two winters.",
            "They shone for two to six hours, and a third fewer vehicles strayed over the line.",
            "The paint costs five times as much and wears off quickly, in part under snow ploughs.",
            "A tougher mixture is to be used in bends only.",
        ),
        ("the cows and the straw", "the word of residents", "which month the ploughs did harm"),
    ),
    Article(
        "The public clock of Mirelle has been wrong for so long that the town has grown fond of it. "
        "Built in 1903 by a watchmaker who was paid in wine, it gains four minutes a day and is set "
        "back every noon by a volunteer. Last month an anonymous donor offered a modern movement "
        "guided by radio. A petition against the gift gathered nine hundred signatures in a town of "
        "two thousand. Supporters of the new clock point out that commuters miss buses. Opponents "
        "answer that everyone carries a telephone, and that the noon ringing, when the volunteer "
        "turns the hands, draws visitors. The council found a way out: the radio movement will "
        "drive a small dial at the bus stop, and the tower remains as it is.",
        (
            "Mirelle's tower clock of 1903 gains four minutes a day and is set back daily by hand.",
            "A donor offered a precise movement, against which nine hundred people signed.",
            "The council will put the exact clock at the bus stop and leave the tower alone.",
        ),
        ("that the builder was paid in wine", "that everyone has a telephone"),
    ),
    Article(
        "Students of a vocational school in Tarn have built a machine that sorts beach litter. "
        "Driven by a bicycle chain, it sifts two cubic metres of sand an hour and leaves shells "
        "behind. Bottle caps, the most frequent find, are drawn out by a magnet; plastic goes over "
        "a blower onto a belt. In a test on one kilometre of beach, 61 kilograms were collected in "
        "a weekend, of which 48 were plastic. The parts came from scrapped washing machines and "
        "cost 210 euros in total. Biologists had worried about eggs of plovers, so the machine is "
        "used only from September to March. Three coastal towns have asked for the drawings, which "
        "the class published for free, along with a list of everything that went wrong on the way.",
        (
            (
                "Students in Tarn built a pedal-driven machine from scrap for 210 euros that sorts litter "
                "from sand."
            ),
            "In a weekend it took 61 kilograms from a kilometre of beach, 48 of them plastic.",
            "To spare birds' eggs it runs from September to March only.",
            "The drawings are free, and three towns want them.",
        ),
        ("the magnet for caps", "the list of failures", "how much sand an hour"),
    ),
)

LETTERS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "You sent the wrong size again. Fix it.",
        "to a shop, polite but firm",
        (
            (
                "Thank you for the parcel. Unfortunately it holds size 41 again, while I had ordered 43. "
                "Could you please send the right pair and let me know how to return this one?"
            ),
            (
                "I'm sorry to write a second time: the shoes that arrived today are not the size I "
                "ordered either. Please send the correct ones, and tell me what to do with these."
            ),
        ),
    ),
    (
        "I can't come to your party, I'm too tired.",
        "to a friend, warm",
        (
            (
                "I was looking forward to Saturday, but this week has used me up completely. I'd be a "
                "yawning guest. May I come by next week with a cake and hear everything?"
            ),
            (
                "Forgive me if I stay at home on Saturday: I can hardly keep my eyes open. Celebrate "
                "well, and keep an evening for me soon."
            ),
        ),
    ),
    (
        "Your report is unreadable. Too long and no structure.",
        "to a younger colleague, encouraging",
        (
            (
                "There is a lot of good work in your report. To let it be seen, I would put the three "
                "results on the first page and move the tables to the end. Shall we look at it together "
                "tomorrow?"
            ),
            (
                "Thank you for the thorough report. Readers with little time will want the conclusions "
                "first; half the length and a few headings would help them. I'm glad to go through it "
                "with you."
            ),
        ),
    ),
    (
        "The heating is broken, I told you a week ago, do something.",
        "to a landlord, factual",
        (
            (
                "As I reported on the third, the heating in the living room has not worked since then; "
                "this morning it was 15 degrees. Please have it repaired by Friday, and tell me when "
                "somebody will come."
            ),
            (
                "I refer to my message of last week: the radiators are still cold. Please name a date "
                "for the repair within three days."
            ),
        ),
    ),
    (
        "No, I won't work this weekend.",
        "to a manager, friendly and clear",
        (
            (
                "I can't take over the weekend this time, as I have made plans with my family. On Monday "
                "I can start at seven, if that helps with the delivery."
            ),
            (
                "Thanks for asking. This weekend is not possible for me; I'd gladly help to plan the "
                "work so that it can be done during the week."
            ),
        ),
    ),
    (
        "Your dog barks all night. I'm going mad.",
        "to a neighbour, kind",
        (
            (
                "I hope you are well. Perhaps you are not aware of it, but your dog barks from about two "
                "to four most nights, and I wake up each time. Could we think together about what might "
                "calm him?"
            ),
            (
                "May I mention something? Your dog seems to be lonely at night, and my bedroom is just "
                "above. Maybe it would help if he slept at the other side of the house."
            ),
        ),
    ),
)

SCENES: dict[str, tuple[str, ...]] = {
    "a railway station at five in the morning": (
        "The departure board clatters once and falls silent again.",
        "A sweeper pushes last night's confetti in front of him as if it had been his own party.",
        "Steam from a paper cup is the warmest thing on platform three.",
        "Two nurses on their way home share a headphone and say nothing.",
        "Pigeons walk between the tracks with the calm of owners.",
        "Somewhere a shutter goes up, and the smell of yeast finds its way down the stairs.",
        "The first train stands with its lights off, ticking as it cools.",
    ),
    "a greenhouse in January": (
        "Outside the panes the snow is blue; inside, everything drips.",
        "Seed trays stand in rows like the pews of a very small church.",
        "A thermometer hangs askew, its red thread hardly daring to rise.",
        "The heater hums a single note that the tomatoes seem to lean towards.",
        "It smells of wet clay and of string.",
        "On the bench lies a glove that has kept the shape of a hand.",
        "A robin, which has no business here, inspects the compost.",
    ),
    "a repair shop for instruments": (
        "Violins without strings hang from the beam like sleeping bats.",
        "The glue pot mutters on its plate.",
        "He taps a cello's back with one knuckle and listens as a doctor would.",
        "Shavings of spruce curl on the floor, thin enough to read through.",
        "A clarinet lies in eleven pieces, each with a label in pencil.",
        "Through the wall comes a scale, played slowly, with the same wrong note each time.",
        "Nobody hurries; the varnish decides when it is dry.",
    ),
    "a mountain hut during a storm": (
        "The wind leans on the door with its whole weight and lets go again.",
        "Eleven pairs of socks hang above the stove, and nobody remembers whose are whose.",
        "Cards are dealt, though the light hardly reaches the table.",
        "The warden counts the loaves, then the guests, then the loaves.",
        "Hail crosses the roof like somebody in a great hurry.",
        "A wet dog has found the only armchair and defends it with a look.",
        "Between two gusts one hears the stream, twice as loud as at noon.",
    ),
    "a street market at closing time": (
        "Prices fall by the minute, and voices rise to make up for it.",
        "Crushed leaves, ice and fish scales make a carpet that nobody has ordered.",
        "A boy builds a tower of empty crates and is its king until the lorry comes.",
        "The cheese seller wraps what is left as carefully as the first piece of the day.",
        "Under an awning two old women divide a melon with a pocket knife.",
        "Gulls have sent one of theirs to negotiate.",
        "When the last generator stops, the square is surprised by its own echo.",
    ),
    "a reading room before the exams": (
        "Forty lamps, forty islands.",
        "A page is turned so slowly that it sounds like a sigh.",
        "Somebody has fallen asleep on the history of canals.",
        "The librarian walks on rubber soles and sees everything.",
        "Pencils lie in order of length beside a notebook that is still white.",
        "Rain starts on the skylight, and heads come up as one.",
        "In the last row two people pass a note that says only: soup?",
    ),
}
