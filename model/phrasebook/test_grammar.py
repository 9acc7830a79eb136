"""Checks of the grammar, with the standard library alone.

python -m unittest
"""

import json
import unittest
from pathlib import Path

import grammar
from numerals import en_number, fr_number, sv_number


class Numerals(unittest.TestCase):
    """Numbers whose spelling is easy to get wrong."""

    def test_english(self):
        self.assertEqual(en_number(105), "one hundred and five")
        self.assertEqual(en_number(1005), "one thousand and five")
        self.assertEqual(en_number(1215), "one thousand two hundred and fifteen")

    def test_french(self):
        expected = {
            21: "vingt et un",
            71: "soixante et onze",
            80: "quatre-vingts",
            81: "quatre-vingt-un",
            91: "quatre-vingt-onze",
            200: "deux cents",
            201: "deux cent un",
            1000: "mille",
            2080: "deux mille quatre-vingts",
        }
        self.assertEqual({n: fr_number(n) for n in expected}, expected)
        self.assertEqual(fr_number(121, feminine=True), "cent vingt et une")
        self.assertEqual(fr_number(71, feminine=True), "soixante et onze")
        self.assertEqual(fr_number(80, label=True), "quatre-vingt")

    def test_swedish(self):
        self.assertEqual(sv_number(23), "tjugotre")
        self.assertEqual(sv_number(1101), "ettusenetthundraett")
        self.assertEqual(sv_number(21, common=True), "tjugoen")
        self.assertEqual(sv_number(11, common=True), "elva")


class Split(unittest.TestCase):
    """The promise of the test set: nothing in it was trained on."""

    def test_no_prompt_is_on_both_sides(self):
        train, held_out = grammar.split()
        trained = {prompt for e in train for _, prompt, _ in grammar.rows(e)}
        for row in grammar.held_out_rows():
            self.assertNotIn(row["prompt"], trained)
        self.assertFalse(any(e.closed for e in held_out))

    def test_file_is_what_the_grammar_generates(self):
        lines = Path(__file__).with_name("heldout.jsonl").read_text("utf-8").splitlines()
        self.assertEqual([json.loads(line) for line in lines], grammar.held_out_rows())


if __name__ == "__main__":
    unittest.main()
