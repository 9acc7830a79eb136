//! Sequences that are submitted, planned, preempted and removed, with a fake model.

use super::*;

fn scheduler(step_rows_max: usize, blocks: usize) -> Scheduler {
    Scheduler::new(SchedulerConfig {
        step_rows_max,
        prefill_rows_beside_decode_max: step_rows_max,
        running_max: 8,
        waiting_max: 4,
        tenant_waiting_max: 4,
        blocks,
    })
}

fn submit(s: &mut Scheduler, id: u64, tokens: &[u32], max: usize) -> Result<(), Refused> {
    submit_for(s, "a", id, tokens, max)
}

/// The same for a tenant, whose name is also its salt.
fn submit_for(
    s: &mut Scheduler,
    tenant: &str,
    id: u64,
    tokens: &[u32],
    positions_max: usize,
) -> Result<(), Refused> {
    let (id, salt, reuses) = (SequenceId(id), tenant.as_bytes().to_vec(), true);
    let (tenant, tokens) = (tenant.parse().unwrap(), tokens.to_vec());
    s.submit(NewSequence { id, tenant, tokens, positions_max, reuses, salt })
}

/// Runs one step with a fake model; every finished chunk appends one token.
fn step(scheduler: &mut Scheduler) -> Vec<(u64, usize, usize)> {
    let plan = scheduler.plan();
    for chunk in &plan {
        scheduler.computed(chunk.id, chunk.tokens.len());
        if chunk.reaches_end {
            scheduler.append(chunk.id, 7);
        }
    }
    plan.iter().map(|c| (c.id.0, c.start, c.tokens.len())).collect()
}

#[test]
fn a_decode_goes_before_a_prefill_that_is_split_into_chunks() {
    let mut s = scheduler(4, 64);
    submit(&mut s, 1, &[1; 2], 32).unwrap();
    assert_eq!(step(&mut s), [(1, 0, 2)]);
    submit(&mut s, 2, &[1; 9], 32).unwrap();
    assert_eq!(step(&mut s), [(1, 2, 1), (2, 0, 3)]);
    assert_eq!(step(&mut s), [(1, 3, 1), (2, 3, 3)]);
    assert_eq!(step(&mut s), [(1, 4, 1), (2, 6, 3)]);
    assert_eq!(step(&mut s), [(1, 5, 1), (2, 9, 1)]);
}

#[test]
fn beside_a_decode_a_prefill_goes_on_in_small_chunks() {
    let mut s = scheduler(16, 64);
    s.config.prefill_rows_beside_decode_max = 3;
    submit(&mut s, 1, &[1; 20], 32).unwrap();
    assert_eq!(step(&mut s), [(1, 0, 16)]);
    submit(&mut s, 2, &[2; 20], 32).unwrap();
    // Nobody decodes yet: the rest of one prompt and the beginning of the next.
    assert_eq!(step(&mut s), [(1, 16, 4), (2, 0, 12)]);
    assert_eq!(step(&mut s), [(1, 20, 1), (2, 12, 3)]);
    s.remove(SequenceId(1));
    assert_eq!(step(&mut s), [(2, 15, 5)]);
}

#[test]
fn a_decode_is_in_every_step_whatever_prompts_arrive() {
    for seed in 0..50_u64 {
        let mut s = scheduler(8 + seed as usize % 9, 256);
        s.config.prefill_rows_beside_decode_max = 1 + seed as usize % 5;
        let mut decoding = std::collections::BTreeSet::new();
        for turn in 0..200 {
            let draw = (seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(turn);
            if draw % 3 == 0 {
                let prompt = vec![draw as u32; 1 + (draw >> 8) as usize % 90];
                // A full queue refuses; there is enough to do then.
                let _ = submit(&mut s, turn.into(), &prompt, 512);
            }
            let plan = s.plan();
            let planned = |id: &SequenceId| plan.iter().any(|chunk| chunk.id == *id);
            let left_out = decoding.iter().find(|id| !planned(id));
            assert_eq!(left_out, None, "seed {seed}, turn {turn}");
            for chunk in &plan {
                s.computed(chunk.id, chunk.tokens.len());
                if chunk.reaches_end {
                    s.append(chunk.id, 7);
                    decoding.insert(chunk.id);
                }
            }
            if draw % 5 == 0
                && let Some(done) = decoding.pop_first()
            {
                s.remove(done);
            }
        }
        assert_eq!(s.preemptions(), 0, "seed {seed}: there are blocks for everybody");
    }
}

#[test]
fn when_blocks_run_out_the_youngest_starts_again_and_the_oldest_goes_on() {
    let mut s = scheduler(64, 3);
    submit(&mut s, 1, &[1; 16], 48).unwrap();
    submit(&mut s, 2, &[2; 20], 48).unwrap();
    assert_eq!(step(&mut s), [(1, 0, 16), (2, 0, 20)]);
    // Sequence 1 needs a second block; sequence 2 must give up both of its own.
    assert_eq!(step(&mut s), [(1, 16, 1)]);
    assert_eq!((s.preemptions(), s.waiting_len()), (1, 1));
    s.remove(SequenceId(1));
    // Its first block was full and is still there.
    assert_eq!(step(&mut s), [(2, 16, 5)]);
}

#[test]
fn a_removed_sequence_leaves_no_block_behind() {
    let mut s = scheduler(64, 8);
    submit(&mut s, 1, &[1; 40], 64).unwrap();
    step(&mut s);
    assert_eq!(s.blocks_used(), 3);
    s.remove(SequenceId(1));
    assert_eq!((s.blocks_used(), s.running_len()), (0, 0));
}

#[test]
fn a_sequence_takes_over_what_an_earlier_one_has_computed_but_for_its_last_token() {
    let mut s = scheduler(64, 16);
    let prompt: Vec<u32> = (0..40).collect();
    submit(&mut s, 1, &prompt, 48).unwrap();
    assert_eq!(step(&mut s), [(1, 0, 40)]);
    // Two full blocks are shared while their first user still runs.
    submit(&mut s, 2, &prompt, 48).unwrap();
    assert_eq!(step(&mut s), [(1, 40, 1), (2, 32, 8)]);
    assert_eq!((s.blocks_used(), s.rows_reused()), (4, 32));
    s.remove(SequenceId(1));
    s.remove(SequenceId(2));
    // A prompt of exactly two blocks still computes its last token, so only one is taken.
    submit(&mut s, 3, &prompt[..32], 48).unwrap();
    assert_eq!(step(&mut s), [(3, 16, 16)]);
    assert_eq!(s.blocks_used(), 2);
}

#[test]
fn a_draft_is_computed_beside_the_last_token_and_only_its_right_part_counts() {
    let mut s = scheduler(64, 8);
    submit(&mut s, 1, &[1; 15], 64).unwrap();
    step(&mut s);
    let mut plan = s.plan();
    s.extend(&mut plan[0], &[7, 7, 9, 9]);
    assert_eq!((plan[0].known_len(), &plan[0].tokens[..]), (1, &[7, 7, 7, 9, 9][..]));
    assert_eq!(plan[0].blocks.len(), 2);
    s.computed(SequenceId(1), 1);
    // Two guesses were right, and the third row drew something else.
    for token in [7, 7] {
        s.append(SequenceId(1), token);
        s.computed(SequenceId(1), 1);
    }
    s.append(SequenceId(1), 8);
    let next = s.plan().remove(0);
    assert_eq!((next.start, &next.tokens[..], next.draft_len), (18, &[8][..], 0));
}

#[test]
fn a_draft_never_goes_beyond_what_the_sequence_may_grow_to() {
    let mut s = scheduler(64, 8);
    submit(&mut s, 1, &[1; 4], 7).unwrap();
    step(&mut s);
    // Five of seven tokens are known and the sixth is drawn anyway.
    let mut plan = s.plan();
    s.extend(&mut plan[0], &[7; 9]);
    assert_eq!(plan[0].draft_len, 1);
    s.computed(SequenceId(1), 1);
    s.append(SequenceId(1), 7);
    s.computed(SequenceId(1), 1);
    s.append(SequenceId(1), 7);
    assert_eq!(s.tokens(SequenceId(1)).len(), 7);
}

#[test]
fn a_draft_takes_unused_blocks_only_and_gives_them_back() {
    let mut s = scheduler(64, 3);
    submit(&mut s, 1, &[1; 14], 48).unwrap();
    submit(&mut s, 2, &[2; 14], 48).unwrap();
    step(&mut s);
    let mut plan = s.plan();
    s.extend(&mut plan[0], &[5; 6]);
    s.extend(&mut plan[1], &[6; 6]);
    // The first took the only free block; the second got what fits into its own.
    assert_eq!((plan[0].draft_len, plan[1].draft_len), (6, 1));
    assert_eq!((s.blocks_used(), s.preemptions()), (3, 0));
    for id in [1, 2] {
        s.computed(SequenceId(id), 1);
        s.append(SequenceId(id), 3);
    }
    s.plan();
    assert_eq!((s.blocks_used(), s.preemptions()), (2, 0));
}

#[test]
fn a_block_is_named_after_what_was_drawn_and_not_after_a_guess() {
    let mut s = scheduler(64, 16);
    submit(&mut s, 1, &[1; 14], 64).unwrap();
    step(&mut s);
    let mut plan = s.plan();
    // The guesses fill the block; the first of them is wrong.
    s.extend(&mut plan[0], &[9; 4]);
    s.computed(SequenceId(1), 1);
    s.append(SequenceId(1), 7);
    let mut guessed = vec![1; 14];
    guessed.extend([7, 9, 9, 9, 9]);
    submit(&mut s, 2, &guessed, 64).unwrap();
    assert_eq!(step(&mut s), [(1, 15, 1), (2, 0, 19)]);
    // Now it is full of known tokens, and another sequence may have it.
    let mut known = vec![1; 14];
    known.extend([7, 7, 7]);
    submit(&mut s, 3, &known, 64).unwrap();
    assert_eq!(step(&mut s).last(), Some(&(3, 16, 1)));
}

#[test]
fn what_cannot_fit_is_refused_and_so_is_a_full_queue() {
    let mut s = scheduler(64, 2);
    let refused = submit(&mut s, 1, &[1], 33).unwrap_err();
    assert_eq!(refused, Refused::TooLong { positions: 33, positions_max: 32 });
    for id in 0..4 {
        submit(&mut s, id, &[1], 2).unwrap();
    }
    let refused = submit_for(&mut s, "b", 9, &[1], 2).unwrap_err();
    assert_eq!(refused, Refused::QueueFull { waiting_max: 4 });
}

#[test]
fn a_tenant_that_fills_its_own_queue_leaves_room_for_others() {
    let mut s = scheduler(64, 64);
    s.config.tenant_waiting_max = 3;
    for id in 0..3 {
        submit_for(&mut s, "greedy", id, &[1], 2).unwrap();
    }
    let refused = submit_for(&mut s, "greedy", 3, &[1], 2).unwrap_err();
    assert_eq!(refused, Refused::TenantQueueFull { tenant_waiting_max: 3 });
    submit_for(&mut s, "modest", 4, &[1], 2).unwrap();
    // What has begun waits no more, and makes room.
    s.plan();
    submit_for(&mut s, "greedy", 5, &[1], 2).unwrap();
}

#[test]
fn a_thousand_waiting_requests_of_one_tenant_delay_anothers_first_by_one_turn_at_most() {
    for seed in 0..20_u64 {
        let mut s = scheduler(16, 4_096);
        (s.config.waiting_max, s.config.tenant_waiting_max) = (2_000, 1_000);
        s.config.running_max = 1;
        let mut draw = seed;
        let mut random = |below: u64| {
            draw = draw.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(2 * seed + 1);
            (draw >> 33) % below
        };
        for id in 0..1_000 {
            let prompt = vec![1 + id as u32; 1 + random(40) as usize];
            submit_for(&mut s, "greedy", id, &prompt, 64).unwrap();
        }
        let (comes_at, mut turns) = (random(60), 0);
        for turn in 0.. {
            assert!(turn < 10_000, "seed {seed}: it never came");
            if turn == comes_at {
                submit_for(&mut s, "modest", 5_000, &[9; 30], 64).unwrap();
            }
            let plan = s.plan();
            if plan.iter().any(|chunk| chunk.id.0 == 5_000) {
                break;
            }
            for chunk in plan {
                s.computed(chunk.id, chunk.tokens.len());
                if chunk.reaches_end {
                    s.remove(chunk.id);
                    turns += u64::from(turn >= comes_at);
                }
            }
        }
        assert!(turns <= 1, "seed {seed}: {turns} others ended before it began");
    }
}

#[test]
fn a_prefix_is_shared_by_one_tenants_sequences_and_by_nobody_elses() {
    let mut s = scheduler(64, 16);
    let prompt: Vec<u32> = (0..40).collect();
    submit_for(&mut s, "a", 1, &prompt, 48).unwrap();
    step(&mut s);
    submit_for(&mut s, "b", 2, &prompt, 48).unwrap();
    assert_eq!(step(&mut s).last(), Some(&(2, 0, 40)));
    assert_eq!(s.rows_reused(), 0);
    submit_for(&mut s, "a", 3, &prompt, 48).unwrap();
    assert_eq!(step(&mut s).last(), Some(&(3, 32, 8)));
    assert_eq!(s.rows_reused(), 32);
}

#[test]
fn every_sequence_finishes_however_few_blocks_there_are() {
    for blocks in 2..12 {
        let mut s = scheduler(5, blocks);
        let mut left: std::collections::BTreeMap<u64, usize> = (0..4).map(|i| (i, 20)).collect();
        for id in 0..4 {
            submit(&mut s, id, &vec![1; 3 + id as usize], 32).unwrap();
        }
        let mut steps = 0;
        while !left.is_empty() {
            steps += 1;
            assert!(steps < 2_000, "no progress with {blocks} blocks");
            for chunk in s.plan() {
                s.computed(chunk.id, chunk.tokens.len());
                if !chunk.reaches_end {
                    continue;
                }
                s.append(chunk.id, 7);
                let n = left.get_mut(&chunk.id.0).unwrap();
                *n -= 1;
                if *n == 0 {
                    left.remove(&chunk.id.0);
                    s.remove(chunk.id);
                }
            }
        }
        assert_eq!(s.blocks_used(), 0);
    }
}
