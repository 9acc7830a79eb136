//! Who runs first, of those who may.
//!
//! A device promises nothing about the order of blocks, of warps between barriers, and of the lanes
//! of a warp between meetings. A kernel that is right gives the same bits in every order; one that
//! lacks a barrier gives others in some.

/// An order of blocks, warps and lanes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Order {
    /// The first first. Fast, and the easiest to follow.
    Forward,
    /// The last first.
    Reverse,
    /// As chance has it, which is this state of splitmix64.
    Random(u64),
}

impl Order {
    /// The order of a seed: 0 is forward, 1 is reverse, all others are random.
    pub fn new(seed: u64) -> Self {
        match seed {
            0 => Self::Forward,
            1 => Self::Reverse,
            seed => Self::Random(seed),
        }
    }

    /// One of `count` that may run.
    pub fn pick(&mut self, count: usize) -> usize {
        match self {
            Self::Forward => 0,
            Self::Reverse => count - 1,
            Self::Random(state) => (next(state) % count as u64) as usize,
        }
    }

    /// All of these, in the order in which they run.
    pub fn all<T>(&mut self, mut items: Vec<T>) -> Vec<T> {
        self.arrange(&mut items);
        items
    }

    /// As [`Self::all`], in place. For lists that were arranged before: a list that was reversed is
    /// left as it is.
    pub fn rearrange<T>(&mut self, items: &mut [T]) {
        if matches!(self, Self::Random(_)) {
            self.arrange(items);
        }
    }

    fn arrange<T>(&mut self, items: &mut [T]) {
        match self {
            Self::Forward => {}
            Self::Reverse => items.reverse(),
            Self::Random(state) => {
                for last in (1..items.len()).rev() {
                    items.swap(last, (next(state) % (last as u64 + 1)) as usize);
                }
            }
        }
    }
}

/// The next number of splitmix64 (Steele, Lea and Flood, OOPSLA 2014).
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}
