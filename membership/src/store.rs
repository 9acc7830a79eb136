//! Where a [`Batch`] becomes durable.
