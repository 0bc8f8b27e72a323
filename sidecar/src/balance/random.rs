//! Random by weight: needs no memory and no numbers, and many callers that do not know of each other spread evenly.

use super::endpoints::Candidates;

pub(super) fn pick(candidates: &Candidates<'_>, rng: &mut fastrand::Rng) -> Option<usize> {
    candidates.draw(None, rng)
}
