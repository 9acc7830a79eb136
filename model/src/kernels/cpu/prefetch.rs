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
    /// The same from tile to tile, in [`UNIT`]s.
    tile_units: usize,
    /// Tiles over which the asking is spread.
    tiles: usize,
    /// What is asked for with each line that is read, in [`UNIT`]s.
    share: usize,
}

/// Parts of a byte that shares are counted in. Whole bytes are too coarse: 11 tiles would ask for 5
/// bytes with each line where 5.8 are due, and the last seventh of a panel would not be asked for.
const UNIT: usize = 256;
/// A line in such parts.
const LINE_UNITS: usize = size_of::<Line>() * UNIT;

impl Prefetch {
    /// For `panels` that are multiplied with `tiles` tiles, `upcoming` after them.
    pub fn new(panels: Panels<'_>, tiles: usize, upcoming: Upcoming<'_>) -> Self {
        let start = panels.lines.as_ptr();
        match upcoming {
            Upcoming::Neighbour => Self {
                start: start.wrapping_add(lines_ahead(panels.form)),
                panel_bytes: panels.panel_lines * size_of::<Line>(),
                tile_units: 0,
                tiles: usize::MAX,
                share: LINE_UNITS,
            },
            Upcoming::Panels(next) => {
                // Evenly, so that memory is as busy with the first tile as with the last.
                let tiles = tiles.clamp(1, TILES_MAX);
                let count = panels.lines.len() / panels.panel_lines;
                let panel_bytes = size_of_val(next) / count.max(1);
                let tile_units = panel_bytes * UNIT / tiles;
                let share = tile_units / panels.panel_lines;
                Self { start: next.as_ptr(), panel_bytes, tile_units, tiles, share }
            }
            Upcoming::End => Self { start, panel_bytes: 0, tile_units: 0, tiles: 0, share: 0 },
        }
    }

    /// What to ask for while tile `t` is multiplied with panel `p`.
    #[inline(always)]
    pub fn ahead(&self, p: usize, t: usize) -> Ahead {
        let bytes = p * self.panel_bytes + t * self.tile_units / UNIT;
        let at = self.start.wrapping_byte_add(bytes);
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

/// Most tiles over which asking for a panel is spread: what is due with a step is rounded up to a
/// byte, so with more tiles much of another panel would be asked for too.
const TILES_MAX: usize = 16;

/// Weights to ask for while others are multiplied: for each line that is read, a share of a line.
#[derive(Clone, Copy)]
pub struct Ahead {
    /// The next line to ask for.
    at: *const Line,
    /// Up to where lines are due.
    due: *const Line,
    /// In [`UNIT`]s.
    share: usize,
}

impl Ahead {
    /// Asks for what is due when `N` lines are read.
    #[inline(always)]
    pub fn ask<I: Isa, const N: usize>(&mut self, isa: I) {
        self.due = self.due.wrapping_byte_add((N * self.share).div_ceil(UNIT));
        if self.share == LINE_UNITS {
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

#[cfg(test)]
mod tests {
    use super::super::super::memory::Lines;
    use super::super::portable::Portable;
    use super::*;

    /// Bytes from the first line of `next` to where asking begins and ends with each tile, while
    /// panels of `lines` lines are multiplied, `N` lines at a time.
    fn asked<const N: usize>(lines: &[Line], next: &[Line], tiles: usize) -> Vec<[usize; 2]> {
        let form = Form::Stored(Layout::Bf16);
        let panels = Panels { form, lines, panel_lines: lines.len() };
        let prefetch = Prefetch::new(panels, tiles, Upcoming::Panels(next));
        let isa = Portable;
        let bytes = |line: *const Line| line.addr() - next.as_ptr().addr();
        let span = |t| {
            let mut ahead = prefetch.ahead(0, t);
            let start = bytes(ahead.at);
            (0..lines.len() / N).for_each(|_| ahead.ask::<_, N>(isa));
            [start, bytes(ahead.at)]
        };
        // Late ones of many tiles ask for nothing.
        (0..tiles).map(span).filter(|[start, end]| start < end).collect()
    }

    #[test]
    fn the_next_panel_is_asked_for_from_its_first_line_to_its_last() {
        // Panels of bf16 weights, and q4 weights that are expanded while they are multiplied.
        let shapes = [(1_024, 1_024), (3_584, 3_584), (64, 48), (17 * 32, 9 * 32)];
        for (lines, next) in shapes.map(|(lines, next)| (Lines::zeroed(lines), Lines::zeroed(next)))
        {
            for tiles in 1..40 {
                let spans = match lines.len() % 17 {
                    0 => asked::<17>(&lines, &next, tiles),
                    _ => asked::<2>(&lines, &next, tiles),
                };
                let gap = spans.windows(2).any(|two| two[0][1] < two[1][0]);
                let (first, last) = (spans[0][0], spans.iter().map(|span| span[1]).max());
                let whole = first == 0 && last >= Some(next.bytes());
                assert!(whole && !gap, "{} lines, {tiles} tiles: {spans:?}", next.len());
                let total: usize = spans.iter().map(|[start, end]| end - start).sum();
                let most = next.bytes() * 5 / 4 + tiles * size_of::<Line>();
                assert!(total <= most, "{total} bytes of {} with {tiles} tiles", next.bytes());
            }
        }
    }
}
