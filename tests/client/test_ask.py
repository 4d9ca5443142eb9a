"""Grounded answers: cited from the collection or refused, and always in the trace."""

import os
import unittest

from server import COLLECTION, HERE, server

MODEL = "smollm2-135m-instruct"
QUESTION = "When does the ferry leave the mainland pier?"
OFF_TOPIC = "Who won the chess championship of Iceland in 1954?"
REFUSAL = "not in context"


def corpus():
    """All documents as one text with single spaces."""
    texts = []
    for name in sorted(os.listdir(os.path.join(HERE, "corpus"))):
        with open(os.path.join(HERE, "corpus", name), encoding="utf-8") as file:
            texts.append(file.read())
    return " ".join(" ".join(texts).split())


class Ask(unittest.TestCase):
    def check(self, answer, text):
        """What holds for every decision, whatever this small model can do."""
        self.assertTrue(answer["trace_id"])
        self.assertIsInstance(answer["metrics"]["ds_raw_min"], float)
        self.assertTrue(answer["metrics"]["ds_status"])
        if answer["refusal"]:
            self.assertEqual(text, REFUSAL)
            self.assertTrue(answer["reason"])
            self.assertEqual(answer["citations"], [])
        else:
            self.assertTrue(text.strip())
            self.assertTrue(answer["citations"], "an answer without evidence must be refused")
            for citation in answer["citations"]:
                self.assertIn(" ".join(citation["text"].split()), corpus())
                self.assertIn(citation["source"], ("model", "attributed"))
        record = self.record(answer["trace_id"])
        self.assertEqual(record["answer_text"], text)
        self.assertEqual(record["refusal"], answer["refusal"])
        return record

    def record(self, trace_id):
        records = [
            record
            for record in server().traces()
            if record["trace_id"] == trace_id and record["event"] == "answer.decide"
        ]
        self.assertEqual(len(records), 1)
        return records[0]

    def ask(self, question):
        reply = server().post("/v1/ask", {"question": question, "collection": COLLECTION})
        self.assertEqual(reply.status, 200, reply.body)
        return reply.json()

    def test_a_question_to_the_collection(self):
        answer = self.ask(QUESTION)
        record = self.check(answer, answer["answer"])
        best = record["retrieved"][0]
        self.assertIn("ferry", best["snippet_id"] + best["section_id"])
        self.assertGreater(record["pins"]["index_hash"], "")

    def test_asking_twice_is_a_repeat(self):
        first, second = self.ask(QUESTION), self.ask(QUESTION)
        self.assertEqual(first["answer"], second["answer"])
        self.assertNotEqual(first["trace_id"], second["trace_id"])

    def test_the_only_collection_needs_no_name(self):
        reply = server().post("/v1/ask", {"question": QUESTION})
        self.assertEqual(reply.status, 200, reply.body)

    def test_an_off_topic_question_is_farther_away(self):
        near, far = self.ask(QUESTION), self.ask(OFF_TOPIC)
        self.check(far, far["answer"])
        self.assertLess(near["metrics"]["ds_raw_min"], far["metrics"]["ds_raw_min"])

    def test_an_empty_question_is_refused(self):
        reply = server().post("/v1/ask", {"question": " "})
        self.assertEqual((reply.status, reply.json()["error"]["param"]), (400, "question"))


class GroundedChat(Ask):
    """The same decision through chat completions."""

    def ask(self, question):
        completion = server().client().chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": question}],
            extra_body={"exrail": {"collection": COLLECTION}},
        )
        answer = completion.choices[0].message.content
        return {**completion.model_extra["exrail"], "answer": answer}

    def test_a_stream_ends_with_the_evidence(self):
        chunks = list(
            server().client().chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": QUESTION}],
                extra_body={"exrail": {"collection": COLLECTION}},
                stream=True,
            )
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        self.assertEqual(text, self.ask(QUESTION)["answer"])
        self.check(chunks[-1].model_extra["exrail"], text)

    def test_a_history_is_refused(self):
        reply = server().post("/v1/chat/completions", {
            "model": MODEL,
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": QUESTION},
            ],
            "exrail": {"collection": COLLECTION},
        })
        self.assertEqual((reply.status, reply.json()["error"]["param"]), (400, "messages"))
