"""Rows as they lie in each data set of the hub, and the canonical rows and drops that must come of them."""


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def answers(*texts):
    return [[assistant(text)] for text in texts]


def chat_row(*texts, prompt="say it"):
    return {"prompt": [user(prompt)], "responses": answers(*texts), "scores": [float(k) for k in range(len(texts))]}


def completion(response, overall, *ratings, model="m"):
    aspects = ("helpfulness", "honesty", "instruction_following", "truthfulness")
    return {
        "annotations": {aspect: {"Rating": r, "Rationale": "x"} for aspect, r in zip(aspects, ratings, strict=True)},
        "custom_system_prompt": "Be brief.",
        "fine-grained_score": None,
        "model": model,
        "overall_score": overall,
        "response": response,
    }


ULTRAFEEDBACK = [
    {"source": "flan", "instruction": "Say hi.", "completions": [
        completion("Hi.", 9.0, "5", "4", "N/A", "3", model="a"), completion("", 2.0, *"1111", model="b"),
        completion("Ho.", 9.0, "N/A", "N/A", "N/A", "2", model="c"),
    ]},
    {"source": "sharegpt", "instruction": "One?", "completions": [completion("1", 7.0, *"4444")]},
    {"source": "ultrachat", "instruction": "None?", "completions": []},
    {"source": "truthful_qa", "instruction": "Unrated?", "completions": [
        completion("x", None, *["N/A"] * 4), completion("y", 5.0, *"3333"), completion("z", 1.5, "1", "2", None, "2"),
    ]},
]  # fmt: skip
UTTERANCE = {"conversation_type": "unguided", "included_in_balanced_subset": True, "model_provider": "p"}


def utterance(conversation, turn, k, prompt, response, score, chosen=False, user_id="u1"):
    return {
        **UTTERANCE, "utterance_id": f"{conversation}{turn}{k}", "interaction_id": f"{conversation}-{turn}",
        "conversation_id": conversation, "user_id": user_id, "turn": turn, "within_turn_id": k,
        "user_prompt": prompt, "model_response": response, "model_name": f"m{k}", "score": score, "if_chosen": chosen,
    }  # fmt: skip


def message(name, parent, role, text, rank=None, tree="r", lang="en", deleted=False):
    return {
        "message_id": name, "parent_id": parent, "text": text, "role": role, "lang": lang, "deleted": deleted,
        "rank": rank, "message_tree_id": tree, "labels": None,
    }  # fmt: skip


def helpsteer(prompt, response, helpfulness, other=1):
    marks = dict.fromkeys(("correctness", "coherence", "complexity", "verbosity"), other)
    return {"prompt": prompt, "response": response, "helpfulness": helpfulness, **marks}


def marks(*values):
    return {name: [float(v) for v in values] for name in ("correctness", "coherence", "complexity", "verbosity")}


def nectar(prompt, *answers):
    ranked = [{"answer": text, "model": f"m{i}", "rank": rank} for i, (text, rank) in enumerate(answers)]
    return {"prompt": prompt, "answers": ranked, "num_responses": len(ranked), "good_natured": True}


def armorm(responses, scores):
    pair = {side: [user("Q?"), assistant(responses[0])] for side in ("chosen", "rejected")}
    return {
        "prompt_id": "p", "prompt": "Q?", "all_generated_responses": responses, "all_rm_scores": scores, **pair,
    }  # fmt: skip


def chats(*texts, scores, prompt="Q?", head=None):
    head = head or [user(prompt)]
    answered = {f"A{i}": [*head, assistant(text)] for i, text in enumerate(texts)}
    return {"prompt": prompt, "prompt_id": "p", **answered, **{f"score_A{i}": s for i, s in enumerate(scores)}}


TALK = [user("Hi"), assistant("Hello."), user("Sing.")]


def ultrafeedback_case(first, second):
    rows = [
        {"prompt": [user("Say hi.")], "responses": answers("Hi.", "Ho."), "scores": first, "models": ["a", "c"],
         "source": "flan"},
        {"prompt": [user("Unrated?")], "responses": answers("y", "z"), "scores": second, "models": ["m", "m"],
         "source": "truthful_qa"},
    ]  # fmt: skip
    dropped = {"no completions": 1, "fewer than 2 responses given": 1}
    return ULTRAFEEDBACK, rows, dropped, {"empty text": 1, "missing score": 1}


# format: (rows of the source, canonical rows, rows dropped, responses dropped)
CASES = {
    "ultrafeedback": ultrafeedback_case([9.0, 9.0], [5.0, 1.5]),
    "ultrafeedback_fine_grained": ultrafeedback_case([4.0, 2.0], [3.0, 5 / 3]),
    "nectar": (
        [
            nectar("\n\nHuman: Bread?\n\nAssistant: ", ("b", 2.0), ("a", 1.0), ("c", None), ("d", 2.0)),
            nectar("\n\nHuman: Pick.\n\nAssistant: Nine.\n\nHuman:  Two\nit.\n\nAssistant:", ("18", 1.0), ("9", 2.0)),
            nectar("\n\nHuman: Nothing.\n\nAssistant: ", (" ", 1.0)),
            nectar("Bread?", ("a", 1.0), ("b", 2.0)),
            nectar("\n\nHuman: a\n\nHuman: b\n\nAssistant: ", ("a", 1.0), ("b", 2.0)),
            nectar("\n\nHuman: a\n\nAssistant: b\n\nAssistant: ", ("a", 1.0), ("b", 2.0)),
            nectar("\n\nHuman: a\n\nAssistant: b", ("a", 1.0), ("b", 2.0)),
        ],
        [
            {"prompt": [user("Bread?")], "responses": answers("b", "a", "d"), "scores": [-2.0, -1.0, -2.0],
             "models": ["m0", "m1", "m3"], "good_natured": True},
            {"prompt": [user("Pick."), assistant("Nine."), user(" Two\nit.")], "responses": answers("18", "9"),
             "scores": [-1.0, -2.0], "models": ["m0", "m1"], "good_natured": True},
        ],
        {
            "fewer than 2 responses given": 1,
            "no assistant marker": 1,
            "the turns of the prompt do not alternate between Human and Assistant": 1,
            "the prompt does not end with a human turn": 1,
            "the prompt does not end where the assistant's turn begins": 1,
        },
        {"missing score": 1},
    ),
    "armorm": (
        [
            armorm(["a", "b", "a", "c", "d"], [0.5, -1.25, 0.5, 2.0, 0.0]),
            armorm(["a", "", "b"], [1.0, 0.5, None]),
            armorm(["a"], [1.0]),
        ],
        [{"prompt": [user("Q?")], "responses": answers("a", "b", "a", "c", "d"),
          "scores": [0.5, -1.25, 0.5, 2.0, 0.0], "prompt_id": "p"}],
        {"fewer than 2 usable responses left": 1, "fewer than 2 responses given": 1},
        {"empty text": 1, "missing score": 1},
    ),
    "helpsteer2": (
        [
            helpsteer("Name?", "Snail", 4, 3),
            helpsteer("Name?", "Ship", 1, 2),
            helpsteer("Tea?\n<extra_id_1>Assistant\nMint.\n<extra_id_1>User\nWhy?", "Because.", 3),
            helpsteer("Tea?\n<extra_id_1>Assistant\nMint.\n<extra_id_1>User\nWhy?", "", 3),
            helpsteer("Tea?\n<extra_id_1>Assistant\nMint.\n<extra_id_1>User\nWhy?", "So.", 3, 0),
            helpsteer("Alone?", "Yes", 4),
            helpsteer("Name?", "Again", 2),
            helpsteer("Q\n<extra_id_1>Assistant\nA\n<extra_id_1>Assistant\nB", "x", 1),
        ],
        [
            {"prompt": [user("Name?")], "responses": answers("Snail", "Ship"), "scores": [4.0, 1.0], **marks(3, 2)},
            {"prompt": [user("Tea?"), assistant("Mint."), user("Why?")], "responses": answers("Because.", "So."),
             "scores": [3.0, 3.0], **marks(1, 0)},
        ],
        {
            "fewer than 2 responses given": 2,
            "the turns of the prompt do not alternate, or do not end with the user's": 1,
        },
        {"empty text": 1},
    ),
    "prism": (
        [
            utterance("c1", 0, 0, "Cook?", "Be kind.", 88, chosen=True),
            utterance("c1", 0, 1, "Cook?", "No.", 12),
            utterance("c1", 1, 1, "And then?", "Say so.", 65),
            utterance("c1", 1, 0, "And then?", "Smile.", 65, chosen=True),
            utterance("c1", 2, 0, "And?", "Eat.", 5),
            utterance("c1", 2, 1, "And?", "Go.", 9),
            utterance("c1", 3, 0, "Oh?", "a", 5),
            utterance("c1", 3, 1, "Oh?", "b", 6),
            utterance("c2", 0, 0, "hola", "Hola!", None, chosen=True, user_id="u2"),
            utterance("c3", 1, 0, "late", "a", 1, user_id="u2"),
            utterance("c3", 1, 1, "late", "b", 2, user_id="u2"),
            utterance("c4", 0, 0, "one", "a", 1),
            utterance("c4", 0, 1, "two", "b", 2),
        ],
        [
            {"prompt": [user("Cook?")], "responses": answers("Be kind.", "No."), "scores": [88.0, 12.0],
             "annotator": "u1", "models": ["m0", "m1"], "conversation_id": "c1", "interaction_id": "c1-0",
             "conversation_type": "unguided"},
            {"prompt": [user("Cook?"), assistant("Be kind."), user("And then?")],
             "responses": answers("Smile.", "Say so."), "scores": [65.0, 65.0], "annotator": "u1",
             "models": ["m0", "m1"], "conversation_id": "c1", "interaction_id": "c1-1",
             "conversation_type": "unguided"},
            {"prompt": [user("Cook?"), assistant("Be kind."), user("And then?"), assistant("Smile."), user("And?")],
             "responses": answers("Eat.", "Go."), "scores": [5.0, 9.0], "annotator": "u1",
             "models": ["m0", "m1"], "conversation_id": "c1", "interaction_id": "c1-2",
             "conversation_type": "unguided"},
        ],
        {
            "an earlier turn of the conversation has no single chosen response": 1,
            "fewer than 2 responses given": 1,
            "an earlier turn of the conversation is missing, or there twice": 1,
            "the responses of an interaction answer different prompts": 1,
        },
        {},
    ),
    "oasst1": (
        [
            message("r", None, "prompter", "Squeak?"),
            message("a", "r", "assistant", "Oil.", 0),
            message("b", "r", "assistant", "New door.", 2),
            message("c", "r", "assistant", "Öl.", 1, lang="de"),
            message("d", "r", "assistant", "asdf", deleted=True),
            message("e", "a", "prompter", "Only butter."),
            message("f", "e", "assistant", "Wax."),
            message("g", "e", "assistant", "Wait.", 1),
            message("h", "e", "assistant", "Buy.", 0),
            message("s", None, "prompter", "Other?", tree="s"),
            message("t", "s", "assistant", "One.", tree="s"),
            message("u", "gone", "assistant", "Lost.", 0, tree="s"),
            message("v", "t", "assistant", "More.", 0, tree="s"),
            message("x", None, "prompter", "Gone?", tree="x", deleted=True),
            message("y", "x", "assistant", "a", 0, tree="x"),
            message("z", "x", "assistant", "b", 1, tree="x"),
            message("k", "l", "prompter", "round", tree="k"),
            message("l", "k", "assistant", "and", 0, tree="k"),
        ],
        [
            {"prompt": [user("Squeak?")], "responses": answers("Oil.", "New door.", "Öl."),
             "scores": [0.0, -2.0, -1.0], "langs": ["en", "en", "de"], "lang": "en", "message_id": "r"},
            {"prompt": [user("Squeak?"), assistant("Oil."), user("Only butter.")],
             "responses": answers("Wait.", "Buy."), "scores": [-1.0, 0.0], "langs": ["en", "en"], "lang": "en",
             "message_id": "e"},
        ],
        {
            "fewer than 2 responses given": 1,
            "a message of the prompt is missing": 1,
            "a reply to a reply of the assistant": 1,
            "a message of the prompt is deleted": 1,
            "the messages of the prompt answer each other in a circle": 1,
        },
        {"deleted": 1, "missing score": 1},
    ),
    "hh_rlhf": (
        [
            {"chosen": "\n\nHuman: Wool?\n\nAssistant: Use cool water.",
             "rejected": "\n\nHuman: Wool?\n\nAssistant: Use hot water."},
            {"chosen": "\n\nHuman: Fact.\n\nAssistant: Snails.\n\nHuman: Really?\n\nAssistant: Yes, ten.",
             "rejected": "\n\nHuman: Fact.\n\nAssistant: Snails.\n\nHuman: Really?\n\nAssistant: Yes.\n"},
            {"chosen": "\n\nHuman: Cat?\n\nAssistant: Sorry.", "rejected": "\n\nHuman: Cat?\n\nAssistant:"},
            {"chosen": "\n\nHuman: Who?\n\nAssistant: It says\n\nHuman: hello",
             "rejected": "\n\nHuman: Who?\n\nAssistant: Nobody."},
            {"chosen": "\n\nHuman: Who?\n\nAssistant: It says\n\nAssistant: hello",
             "rejected": "\n\nHuman: Who?\n\nAssistant: Nobody."},
            {"chosen": "\n\nHuman: ok\n\nAssistant: Good.", "rejected": "\n\nHuman: ok\n\nAssistant: Good."},
        ],
        [
            {"prompt": [user("Wool?")], "responses": answers("Use cool water.", "Use hot water."),
             "scores": [1.0, 0.0]},
            {"prompt": [user("Fact."), assistant("Snails."), user("Really?")],
             "responses": answers("Yes, ten.", "Yes.\n"), "scores": [1.0, 0.0]},
            {"prompt": [user("Who?")], "responses": answers("It says\n\nHuman: hello", "Nobody."),
             "scores": [1.0, 0.0]},
        ],
        {
            "fewer than 2 usable responses left": 1,
            "chosen and rejected do not share one prompt": 1,
            "chosen and rejected are the same answer": 1,
        },
        {"empty text": 1},
    ),
    "argilla": (
        [
            {"source": "s", "instruction": "Quick?", "chosen_response": "Swift.", "rejected_response": "Slow.",
             "chosen_avg_rating": 5.0, "rejected_avg_rating": 1.75, "chosen_model": "m"},
            {"source": "t", "instruction": "Été?", "chosen_response": "Été.", "rejected_response": "",
             "chosen_avg_rating": 4.5, "rejected_avg_rating": None, "chosen_model": "m"},
        ],
        [{"prompt": [user("Quick?")], "responses": answers("Swift.", "Slow."), "scores": [5.0, 1.75],
          "source": "s"}],
        {"fewer than 2 usable responses left": 1},
        {"empty text": 1},
    ),
    "scored_pairs": (
        [
            {"chosen": [*TALK, assistant("La.")], "rejected": [*TALK, assistant("No.")], "score_chosen": 7.5,
             "score_rejected": 7.5},
            {"chosen": [user("мост"), assistant("мост")], "rejected": [user("мост"), assistant("")],
             "score_chosen": 8.0, "score_rejected": 1.0},
            {"chosen": [user("Tea?"), assistant("Tea.")], "rejected": [user("Tea?"), assistant("Tea.")],
             "score_chosen": 6.0, "score_rejected": 6.0},
        ],
        [
            {"prompt": TALK, "responses": answers("La.", "No."), "scores": [7.5, 7.5]},
            {"prompt": [user("Tea?")], "responses": answers("Tea.", "Tea."), "scores": [6.0, 6.0]},
        ],
        {"fewer than 2 usable responses left": 1},
        {"empty text": 1},
    ),
    "argilla_cleaned": (
        [
            {"source": "s", "prompt": "Quick?", "chosen": [user("Quick?"), assistant("Swift.")],
             "rejected": [user("Quick?"), assistant("Slow.")], "chosen-rating": 5.0, "rejected-rating": 1.25,
             "chosen-model": "m", "rejected-model": "n"},
            {"source": "t", "prompt": "Été?", "chosen": [user("Été?"), assistant("Été.")],
             "rejected": [user("Été?"), assistant("")], "chosen-rating": 4.5, "rejected-rating": 1.0,
             "chosen-model": "m", "rejected-model": "n"},
        ],
        [{"prompt": [user("Quick?")], "responses": answers("Swift.", "Slow."), "scores": [5.0, 1.25], "source": "s",
          "chosen-model": "m", "rejected-model": "n"}],
        {"fewer than 2 usable responses left": 1},
        {"empty text": 1},
    ),
    "numbered": (
        [
            chats("a", "b", "c", "d", scores=[9.0, 9.0, 4.0, 1.0]),
            chats("N/A", "N/A", "N/A", "N/A", scores=[0.0] * 4),
            chats("a", "N/A", "c", "", scores=[9.5, 9.0, None, 1.0], head=TALK),
            {**chats("a", "b", "c", "d", scores=[1.0] * 4), "A1": [user("Other?"), assistant("b")]},
            {**chats("a", "b", "c", "d", scores=[1.0] * 4), "A1": None},
        ],
        [
            {"prompt": [user("Q?")], "responses": answers("a", "b", "c", "d"), "scores": [9.0, 9.0, 4.0, 1.0],
             "prompt_id": "p"},
            {"prompt": TALK, "responses": answers("a", "N/A"), "scores": [9.5, 9.0], "prompt_id": "p"},
            {"prompt": [user("Q?")], "responses": answers("a", "c", "d"), "scores": [1.0] * 3, "prompt_id": "p"},
        ],
        {"placeholder answers (N/A)": 1, "the answers do not share one prompt": 1},
        {"missing score": 1, "empty text": 2},
    ),
    "list_ultrafeedback": (
        [
            {"prompt_id": "p", "prompt": "Fog?", "all_responses": list("abcdefgh"),
             "overall_scores": [0.5, 0.5, 0.75, 0.25, 0.0, 1.0, 0.5, 0.5]},
            {"prompt_id": "q", "prompt": "One?", "all_responses": ["1", "One."], "overall_scores": [0.7, None]},
        ],
        [{"prompt": [user("Fog?")], "responses": answers(*"abcdefgh"),
          "scores": [0.5, 0.5, 0.75, 0.25, 0.0, 1.0, 0.5, 0.5], "prompt_id": "p"}],
        {"fewer than 2 usable responses left": 1},
        {"missing score": 1},
    ),
    "pairs": (
        [{"prompt": "a", "chosen": "x", "rejected": "y"}, {"prompt": " ", "chosen": "x", "rejected": "y"}],
        [{"prompt": "a", "responses": ["x", "y"], "scores": [1.0, 0.0]}],
        {"prompt is empty": 1},
        {},
    ),
    "rows": (
        [{"prompt": "a", "responses": ["x", "y"], "scores": [1, 2]},
         {"prompt": "b", "responses": [], "scores": []}],
        [{"prompt": "a", "responses": ["x", "y"], "scores": [1.0, 2.0]}],
        {"fewer than 2 responses given": 1},
        {},
    ),
}  # fmt: skip
