//! Order, limits and end of requests.
#![expect(clippy::expect_used, reason = "a test may fail")]

mod small_arena;

use prefixfast_core::batch::place::Place;
use prefixfast_core::batch::schedule::{Request, Scheduler, SchedulerConfig};
use prefixfast_core::{Error, Limit};
use small_arena::{request, scheduler_config};

/// Ids of all requests in the order of their prefill. Each request is decoded once.
fn prefill_order(scheduler: &mut Scheduler) -> Vec<i64> {
    let mut out = vec![0; scheduler.buffer_len()];
    let mut order = Vec::new();
    while scheduler.num_running() + scheduler.num_waiting() > 0 {
        let header = scheduler.plan_step(0, &mut out).expect("a step");
        order.extend(&header.prefill_ids);
        scheduler.commit(&header.decode_ids).expect("a commit");
    }
    order
}

#[test]
fn requests_are_ordered_by_priority_then_arrival() {
    let mut scheduler = Scheduler::new(SchedulerConfig {
        max_rows: 1,
        ..scheduler_config()
    })
    .expect("a scheduler");
    for (id, priority) in [(1, 0), (2, 5), (3, 5)] {
        scheduler
            .add(Request {
                priority,
                ..request(id, &[], 3, 1, 2)
            })
            .expect("room");
    }
    assert_eq!(prefill_order(&mut scheduler), [2, 3, 1]);
}

#[test]
fn tenants_get_equal_service() {
    let mut scheduler = Scheduler::new(SchedulerConfig {
        max_rows: 1,
        ..scheduler_config()
    })
    .expect("a scheduler");
    for id in 0..12 {
        let tenant = i64::from(id >= 10);
        scheduler
            .add(Request {
                tenant,
                ..request(id, &[], 3, 1, 2)
            })
            .expect("room");
    }
    assert_eq!(prefill_order(&mut scheduler), [0, 10, 1, 11, 2, 3, 4, 5, 6, 7, 8, 9]);
}

#[test]
fn a_long_prompt_is_prefilled_in_chunks_beside_decode_rows() {
    let mut scheduler = Scheduler::new(scheduler_config()).expect("a scheduler");
    scheduler.add(request(1, &[], 3, 2, 9)).expect("room");
    scheduler.add(request(2, &[], 120, 1, 2)).expect("room");
    let mut out = vec![0; scheduler.buffer_len()];
    let mut seen = Vec::new();
    for _ in 0..5 {
        let header = scheduler.plan_step(0, &mut out).expect("a step");
        seen.push((header.prefill_ids.clone(), header.decode_ids.clone()));
        scheduler.commit(&[]).expect("a commit");
    }
    let both = (vec![2], vec![1]);
    let expected = [
        (vec![1], vec![]),
        both.clone(),
        both.clone(),
        both,
        (vec![], vec![1, 2]),
    ];
    assert_eq!(seen, expected);
}

#[test]
fn requests_are_dropped_after_their_deadline() {
    let mut scheduler = Scheduler::new(SchedulerConfig {
        max_rows: 1,
        ..scheduler_config()
    })
    .expect("a scheduler");
    for (id, deadline) in [(1, 50), (2, 40), (3, i64::MAX)] {
        scheduler
            .add(Request {
                deadline,
                ..request(id, &[], 3, 1, 9)
            })
            .expect("room");
    }
    let mut out = vec![0; scheduler.buffer_len()];
    for (now, expired, prefilled) in [(0, vec![], vec![1]), (39, vec![], vec![]), (60, vec![2, 1], vec![3])] {
        let header = scheduler.plan_step(now, &mut out).expect("a step");
        assert_eq!((header.expired, header.prefill_ids), (expired, prefilled));
        scheduler.commit(&[]).expect("a commit");
    }
}

#[test]
fn calls_out_of_order_are_refused() {
    let mut scheduler = Scheduler::new(scheduler_config()).expect("a scheduler");
    scheduler
        .register_prefix(9, 20, 20, true, Place::Front, &[])
        .expect("a new number");
    let needed = scheduler.buffer_len();
    assert!(matches!(
        scheduler.register_prefix(9, 20, 20, true, Place::Front, &[true, false]),
        Err(Error::Config(_))
    ));
    assert_eq!(
        scheduler.buffer_len(),
        needed,
        "a refused registration changed the state"
    );
    scheduler
        .register_prefix(7, 20, 20, true, Place::Front, &[true, false])
        .expect("a new number");
    assert_eq!(scheduler.buffer_len(), 2 * needed);
    scheduler.forget_prefix(7).expect("idle");
    assert_eq!(scheduler.buffer_len(), needed);
    assert_eq!(scheduler.forget_prefix(8), Err(Error::UnknownPrefix(8)));
    assert_eq!(scheduler.add(request(1, &[8], 3, 1, 1)), Err(Error::UnknownPrefix(8)));
    scheduler.add(request(1, &[9], 3, 1, 1)).expect("room");
    assert!(matches!(
        scheduler.add(request(1, &[9], 3, 1, 1)),
        Err(Error::Request(_))
    ));
    assert!(matches!(scheduler.forget_prefix(9), Err(Error::State(_))));
    assert!(matches!(scheduler.prefix_ready(9), Err(Error::State(_))));
    assert!(matches!(scheduler.commit(&[1]), Err(Error::Request(_))));

    let mut out = vec![0; scheduler.buffer_len()];
    assert!(matches!(
        scheduler.plan_step(0, &mut out[1..]),
        Err(Error::Capacity { .. })
    ));
    assert_eq!((scheduler.num_waiting(), scheduler.num_running()), (1, 0));
    assert_eq!(scheduler.plan_step(0, &mut out).expect("a step").loads, [(9, 0)]);
    scheduler.prefix_ready(9).expect("it was loading");
    assert_eq!(scheduler.plan_step(0, &mut out).expect("a step").prefill_ids, [1]);
    assert!(matches!(scheduler.plan_step(0, &mut out), Err(Error::State(_))));
    assert!(matches!(scheduler.commit(&[1, 1]), Err(Error::Request(_))));
    scheduler.commit(&[]).expect("a commit");
    assert_eq!(scheduler.plan_step(0, &mut out).expect("a step").decode_ids, [1]);
    scheduler.commit(&[]).expect("a commit");
    assert!(matches!(scheduler.plan_step(0, &mut out), Err(Error::State(text)) if text.contains("its 1 steps")));
    scheduler.commit(&[1]).expect("a commit");
    scheduler.forget_prefix(9).expect("idle");
    assert_eq!(scheduler.free_rows(), 320);
}

#[test]
fn requests_that_never_fit_are_refused() {
    let mut scheduler = Scheduler::new(scheduler_config()).expect("a scheduler");
    scheduler
        .register_prefix(0, 300, 300, true, Place::Front, &[])
        .expect("a new number");
    for (wrong, limit, needed, available) in [
        (request(1, &[0], 17, 1, 16), Limit::ArenaRows, 352, 320),
        (request(1, &[], 320, 1, 1), Limit::ArenaRows, 336, 320),
        (request(1, &[], 1, 8, 1), Limit::DecodeRows, 8, 7),
        (request(1, &[], 1, 2, usize::MAX), Limit::ArenaRows, usize::MAX, 320),
    ] {
        let error = Error::Capacity {
            limit,
            needed,
            available,
        };
        assert_eq!(scheduler.add(wrong), Err(error));
    }
    for wrong in [
        request(1, &[], 0, 1, 1),
        request(1, &[], 1, 0, 1),
        request(1, &[], 1, 1, 0),
    ] {
        assert!(
            matches!(scheduler.add(wrong.clone()), Err(Error::Request(_))),
            "{wrong:?}"
        );
    }
    scheduler.add(request(1, &[0], 15, 1, 1)).expect("exactly full");
    let short = SchedulerConfig {
        arena_rows: 79,
        ..scheduler_config()
    };
    assert!(matches!(Scheduler::new(short), Err(Error::Config(_))));
}
