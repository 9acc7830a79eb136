//! What a trunk is asked about rows of logits, and what it answers.
//!
//! A row has a logit for each token of the vocabulary, hundreds of kilobytes of them, of which most
//! readers want next to nothing. So each row comes with what it is needed for, and a trunk from which
//! logits have a way to go answers with no more than that.
//!
//! What it does not know: who asks, how a token is chosen, where logits are computed.

use std::ops::Range;

use crate::engine::sampler::Choice;

/// How much of a row's logits somebody needs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Need {
    /// The token that is chosen of them in this way, and nothing else.
    Token(Choice),
    /// All of them.
    Logits,
}

/// A row that is asked about.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Wanted {
    /// Its number in the step.
    pub row: usize,
    /// What for.
    pub need: Need,
}

/// What is said of a row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Answer<'a> {
    /// The token: what [`choose`](crate::engine::sampler::choose) says of the logits.
    Token(u32),
    /// The logits, `[vocab]`; they answer every need.
    Logits(&'a [f32]),
}

/// The answers about the wanted rows of a step, in their order. Kept for the next step, since to get
/// megabytes from the system costs more than to fill them.
#[derive(Debug, Default)]
pub struct Answers {
    rows: Vec<Held>,
    /// Logits of all rows that have some; may be longer than what they take.
    values: Vec<f32>,
    values_len: usize,
}

#[derive(Debug)]
enum Held {
    Token(u32),
    Logits(Range<usize>),
}

impl Answers {
    /// Forgets the answers and keeps their memory.
    pub fn clear(&mut self) {
        self.rows.clear();
        self.values_len = 0;
    }

    /// Answers about the next row.
    pub fn push_token(&mut self, token: u32) {
        self.rows.push(Held::Token(token));
    }

    /// Answers about the next `rows` rows: gives the place of their logits, `[rows, vocab]`, which
    /// holds whatever was there before.
    pub fn push_logits(&mut self, rows: usize, vocab: usize) -> &mut [f32] {
        let start = self.values_len;
        let places = (0..rows).map(|row| start + row * vocab..start + (row + 1) * vocab);
        self.rows.extend(places.map(Held::Logits));
        self.values_len += rows * vocab;
        if self.values.len() < self.values_len {
            self.values.resize(self.values_len, 0.0);
        }
        &mut self.values[start..self.values_len]
    }

    /// Rows that were answered about.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The answer about one of the wanted rows, counted from the first.
    ///
    /// # Panics
    /// There are not so many.
    pub fn get(&self, at: usize) -> Answer<'_> {
        match &self.rows[at] {
            Held::Token(token) => Answer::Token(*token),
            Held::Logits(values) => Answer::Logits(&self.values[values.clone()]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_those_of_this_step_in_the_order_of_its_rows() {
        let mut answers = Answers::default();
        for step in 0..3_u8 {
            answers.clear();
            answers.push_token(7);
            answers.push_logits(2, 3).copy_from_slice(&[f32::from(step); 6]);
            answers.push_token(9);
            answers.push_logits(1, 3).fill(-1.0);
            let logits = [f32::from(step); 3];
            let want = [
                Answer::Token(7),
                Answer::Logits(&logits),
                Answer::Logits(&logits),
                Answer::Token(9),
                Answer::Logits(&[-1.0; 3]),
            ];
            assert_eq!(answers.len(), want.len());
            want.iter().enumerate().for_each(|(at, want)| assert_eq!(answers.get(at), *want));
        }
    }
}
