//! What the threads of a run tell each other: tokens that arrived, strikes that were made, and that
//! it is time to end.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::figures::Struck;
use super::schedule::Now;
use super::stale::Stale;

/// Shared by the streams of the load, the strikes, and the one who waits for both.
#[derive(Debug)]
pub struct Board {
    state: Mutex<State>,
    changed: Condvar,
}

/// What is on the board.
#[derive(Debug)]
pub struct State {
    start: Instant,
    tokens: u64,
    /// Tokens that somebody waits for.
    awaited_tokens: u64,
    /// Counts up whenever something but the tokens changes.
    changes: u64,
    /// Strikes that were made.
    pub struck: Vec<Struck>,
    /// What was sent in the name of those that have slept; none when nobody did.
    pub stale: Option<Stale>,
    /// Bytes that passed over links while they were cut; none when no link was.
    pub cut_bytes: Option<u64>,
    /// Faults whose last strike is over.
    pub over: Vec<usize>,
    /// Nothing more is to be struck or waited for.
    pub finished: bool,
    /// Somebody wants all of this to end at once.
    pub interrupted: bool,
}

impl State {
    fn begin(interrupted: bool) -> Self {
        Self {
            start: Instant::now(),
            tokens: 0,
            awaited_tokens: u64::MAX,
            changes: 0,
            struck: Vec::new(),
            stale: None,
            cut_bytes: None,
            over: Vec::new(),
            finished: false,
            interrupted,
        }
    }
}

impl Board {
    /// An empty board.
    pub fn new() -> Self {
        Self { state: Mutex::new(State::begin(false)), changed: Condvar::new() }
    }

    /// Wipes the board for a run that begins now.
    pub fn begin(&self) {
        self.tell(|state| *state = State::begin(state.interrupted));
    }

    /// When the run began.
    pub fn start(&self) -> Instant {
        self.lock().start
    }

    /// Milliseconds since then.
    pub fn ms(&self) -> f64 {
        self.start().elapsed().as_secs_f64() * 1e3
    }

    /// How far the run is.
    pub fn now(&self) -> Now {
        Now { ms: self.ms() as u64, tokens: self.lock().tokens }
    }

    /// The board itself, for a look or a change.
    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the board and wakes everyone who waits for a change.
    pub fn tell(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.lock();
        change(&mut state);
        state.changes += 1;
        drop(state);
        self.changed.notify_all();
    }

    /// So many tokens arrived; whether whoever reads them is to go on.
    pub fn saw(&self, tokens: usize) -> bool {
        let mut state = self.lock();
        state.tokens += tokens as u64;
        // Thousands arrive in a second, which is no reason to wake anybody but for the right one.
        if state.tokens >= state.awaited_tokens {
            state.awaited_tokens = u64::MAX;
            self.changed.notify_all();
        }
        !state.interrupted
    }

    /// How often the board has changed so far, for [`Board::wait`].
    pub fn changes(&self) -> u64 {
        self.lock().changes
    }

    /// Waits until the board has changed more often than `seen` or so many tokens have arrived, at
    /// most so long.
    pub fn wait(&self, seen: u64, tokens: u64, longest: Duration) {
        let mut state = self.lock();
        state.awaited_tokens = tokens;
        let same = |state: &mut State| state.changes == seen && state.tokens < tokens;
        drop(self.changed.wait_timeout_while(state, longest, same));
    }

    /// Waits so long, or until `enough` of what is on the board; whether it was the latter.
    pub fn wait_for(&self, long: Duration, enough: impl Fn(&State) -> bool) -> bool {
        let waited = self.changed.wait_timeout_while(self.lock(), long, |state| !enough(state));
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn whoever_waits_for_tokens_or_a_change_is_woken() {
        const LONG: Duration = Duration::from_secs(30);
        let board = Board::new();
        thread::scope(|scope| {
            scope.spawn(|| (0..10).for_each(|_| assert!(board.saw(1))));
            board.wait(board.changes(), 10, LONG);
            assert_eq!(board.now().tokens, 10);
            let seen = board.changes();
            scope.spawn(|| board.tell(|state| state.over.push(3)));
            board.wait(seen, u64::MAX, LONG);
            assert_eq!(board.lock().over, [3]);
            scope.spawn(|| board.tell(|state| state.interrupted = true));
            assert!(board.wait_for(LONG, |state| state.interrupted));
        });
        assert!(!board.saw(1));
        assert!(board.ms() < 30_000.0);
        board.begin();
        assert!(board.lock().over.is_empty() && board.lock().interrupted);
    }
}
