//! Weights that are read soon, asked for while others are multiplied.
//!
//! The micro-kernel keeps the multipliers busy as long as weights come from a cache. It never waits
//! for what is asked for here, and never reads through these addresses, so they may be any.

use super::super::matrix::Layout;
use super::super::memory::Line;
use super::isa::Isa;
use super::microkernel::{Form, Panels};

/// What a thread reads after some panels, as far as that is known.
#[derive(Clone, Copy)]
pub enum Upcoming<'a> {
    /// What follows in memory: light tasks are taken neighbour by neighbour.
    Neighbour,
    /// These panels, as many, read after all tiles have gone through the current ones.
    Panels(&'a [Line]),
    /// Nothing that is known.
    End,
}

impl<'a> Upcoming<'a> {
    /// What follows a task that is `light`, or has all tiles go through it before `next`.
    pub fn new(light: bool, next: Option<&'a [Line]>) -> Self {
        match next {
            _ if light => Self::Neighbour,
            Some(next) => Self::Panels(next),
            None => Self::End,
        }
    }

    /// What is read after the panel `p` of `count`.
    pub fn of_panel(self, p: usize, count: usize) -> Self {
        match self {
            Self::Panels(next) => {
                let len = next.len() / count;
                Self::Panels(&next[p * len..][..len])
            }
            Self::Neighbour | Self::End => self,
        }
    }
}

/// What to ask for with each tile and panel.
pub struct Prefetch {
    start: *const Line,
    /// Bytes from what is asked for with a panel to what is with the next.
    panel_bytes: usize,
    /// The same from tile to tile.
    tile_bytes: usize,
    /// Tiles over which the asking is spread.
    tiles: usize,
    share: usize,
}

impl Prefetch {
    /// For `panels` that are multiplied with `tiles` tiles, `upcoming` after them.
    pub fn new(panels: Panels<'_>, tiles: usize, upcoming: Upcoming<'_>) -> Self {
        const LINE_BYTES: usize = size_of::<Line>();
        let start = panels.lines.as_ptr();
        match upcoming {
            Upcoming::Neighbour => Self {
                start: start.wrapping_add(lines_ahead(panels.form)),
                panel_bytes: panels.panel_lines * LINE_BYTES,
                tile_bytes: 0,
                tiles: usize::MAX,
                share: LINE_BYTES,
            },
            Upcoming::Panels(next) => {
                // Evenly, so that memory is as busy with the first tile as with the last.
                let tiles = tiles.min(TILES_MAX);
                let next_bytes = size_of_val(next);
                let share = next_bytes / (tiles * panels.lines.len()).max(1);
                let count = panels.lines.len() / panels.panel_lines;
                Self {
                    start: next.as_ptr(),
                    panel_bytes: next_bytes / count.max(1),
                    tile_bytes: share * panels.panel_lines,
                    tiles,
                    share,
                }
            }
            Upcoming::End => Self { start, panel_bytes: 0, tile_bytes: 0, tiles: 0, share: 0 },
        }
    }

    /// What to ask for while tile `t` is multiplied with panel `p`.
    #[inline(always)]
    pub fn ahead(&self, p: usize, t: usize) -> Ahead {
        let at = self.start.wrapping_byte_add(p * self.panel_bytes + t * self.tile_bytes);
        Ahead { at, due: at, share: if t < self.tiles { self.share } else { 0 } }
    }
}

/// How far ahead weights that follow in memory are asked for, in lines. It bridges the ends of
/// pages, where the processor's own prefetching stops. What is asked for past the last panel of a
/// share is another thread's and in vain. Measured: with one row, 72 lines instead of 48 bring q4 and
/// bf16 about 2 %, and cost q8 1 %.
fn lines_ahead(form: Form) -> usize {
    match form {
        Form::Stored(Layout::Bf16 | Layout::Q4) => 72,
        Form::Stored(_) | Form::Fp8Widened => 48,
    }
}

/// Most tiles over which asking for a panel is spread: a line is asked for once, and shares of less
/// than a few bytes a line would leave its end out.
const TILES_MAX: usize = 16;

/// Weights to ask for while others are multiplied: for each line that is read, `share` bytes more.
#[derive(Clone, Copy)]
pub struct Ahead {
    /// The next line to ask for.
    at: *const Line,
    /// Up to where lines are due.
    due: *const Line,
    share: usize,
}

impl Ahead {
    /// Asks for what is due when `N` lines are read.
    #[inline(always)]
    pub fn ask<I: Isa, const N: usize>(&mut self, isa: I) {
        self.due = self.due.wrapping_byte_add(N * self.share);
        if self.share == size_of::<Line>() {
            // The same as below, without a branch for each line where rows are few.
            for line in 0..N {
                isa.prefetch(self.at.wrapping_add(line));
            }
            self.at = self.due;
        }
        while self.at < self.due {
            isa.prefetch(self.at);
            self.at = self.at.wrapping_add(1);
        }
    }
}
