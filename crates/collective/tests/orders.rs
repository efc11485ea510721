//! Single turns that random schedules come to seldom: what members and rounds say, event by event.
#![allow(clippy::unwrap_used, clippy::panic)] // a test that cannot go on stops

use mlxnode_collective::{
    Answer, CatchUp, Formation, Member, MemberEffect, MemberId, Order, Report, Rounds, RoundsEffect,
    RoundsOptions,
};
use std::time::{Duration, Instant};

const FIRST: MemberId = MemberId(1);
const SECOND: MemberId = MemberId(2);
const THIRD: MemberId = MemberId(3);
const HALT_WITHIN: Duration = Duration::from_secs(10);
const STEP_WITHIN: Duration = Duration::from_secs(600);

fn options() -> RoundsOptions {
    let gather_within = Duration::from_secs(60);
    RoundsOptions { expected: 2, gather_within, halt_within: HALT_WITHIN, step_within: STEP_WITHIN }
}

fn halted(epoch: u64, position: u64, contributed: bool) -> Report {
    Report::Halted { epoch, position, holds_sum: position > 0, contributed }
}

fn halts(effects: &[RoundsEffect]) -> Vec<(u64, u64, u64)> {
    let halt = |effect: &RoundsEffect| match effect {
        RoundsEffect::Halt { member, epoch, at } => Some((member.0, *epoch, *at)),
        _ => None,
    };
    effects.iter().filter_map(halt).collect()
}

fn formed(effects: &[RoundsEffect]) -> Option<&Formation> {
    effects.iter().find_map(|effect| match effect {
        RoundsEffect::Form { formation, .. } => Some(formation),
        _ => None,
    })
}

/// Two workers that compute in epoch 2 (the second one's arrival ends the gathering).
fn running(now: Instant) -> (Rounds, u64) {
    let mut rounds = Rounds::new(options(), 0);
    rounds.report(FIRST, Report::Ready { position: 0 }, now);
    let halted_for = halts(&rounds.report(SECOND, Report::Ready { position: 0 }, now))[0].1;
    rounds.report(FIRST, halted(halted_for, 0, false), now);
    let effects = rounds.report(SECOND, halted(halted_for, 0, false), now);
    let epoch = formed(&effects).unwrap().epoch;
    (rounds, epoch)
}

#[test]
fn a_stream_that_breaks_while_one_joins_stops_all_at_once() {
    let now = Instant::now();
    let (mut rounds, epoch) = running(now);
    let joining = halts(&rounds.report(THIRD, Report::Ready { position: 0 }, now));
    assert!(joining.iter().all(|(_, _, at)| *at == 2), "at the next border but one: {joining:?}");
    // The formation that is to reach that border cannot.
    let broken = |epoch| Report::Broken { epoch, peer: SECOND, reason: "the stream ended".into() };
    let effects = rounds.report(FIRST, broken(epoch), now);
    let stopping = halts(&effects);
    assert_eq!(stopping.len(), 3);
    assert!(stopping.iter().all(|(_, epoch, at)| *at == 0 && *epoch > joining[0].1), "{stopping:?}");
    // The other end says so too, and so does one that speaks of a formation which never was: nothing follows any more.
    let other = Report::Broken { epoch, peer: FIRST, reason: "the stream ended".into() };
    assert_eq!(rounds.report(SECOND, other, now), []);
    assert_eq!(rounds.report(SECOND, broken(joining[0].1), now), []);
}

#[test]
fn who_joins_while_a_step_is_overdue_stays() {
    let now = Instant::now();
    let (mut rounds, _) = running(now);
    let late = now + STEP_WITHIN;
    assert_eq!(halts(&rounds.tick(late)).len(), 2);
    let epoch = halts(&rounds.report(THIRD, Report::Ready { position: 0 }, late))[0].1;
    rounds.report(FIRST, halted(epoch, 0, true), late);
    rounds.report(SECOND, halted(epoch, 0, false), late);
    let effects = rounds.report(THIRD, halted(epoch, 0, false), late);
    let evicted: Vec<_> = effects
        .iter()
        .filter_map(|effect| match effect {
            RoundsEffect::Evict { member, .. } => Some(*member),
            _ => None,
        })
        .collect();
    assert_eq!(evicted, [SECOND], "it alone owed a part");
}

#[test]
fn other_sums_of_a_step_are_seen_whenever_they_are_told() {
    let now = Instant::now();
    let (mut rounds, epoch) = running(now);
    let applied = |epoch, step, hash| Report::Applied { epoch, step, hash: [hash; 32] };
    // The first one is a step ahead when the second one tells of the step before.
    assert_eq!(rounds.report(FIRST, applied(epoch, 0, 7), now), []);
    assert_eq!(rounds.report(FIRST, applied(epoch, 1, 8), now), []);
    assert_eq!(rounds.report(SECOND, applied(epoch, 0, 7), now), []);
    // The second one gets the sum that it lacks in the next formation.
    rounds.report(THIRD, Report::Ready { position: 0 }, now);
    let broken = Report::Broken { epoch, peer: SECOND, reason: "the stream ended".into() };
    let stopped = halts(&rounds.report(FIRST, broken, now))[0].1;
    rounds.report(FIRST, halted(stopped, 2, false), now);
    rounds.report(SECOND, halted(stopped, 1, false), now);
    let effects = rounds.report(THIRD, halted(stopped, 0, false), now);
    let next = formed(&effects).unwrap();
    assert_eq!((next.step, next.members[1].catch_up), (2, CatchUp::Sum(FIRST)));
    let effects = rounds.report(SECOND, applied(next.epoch, 1, 9), now);
    assert!(
        matches!(&effects[..], [RoundsEffect::Fail { reason }] if reason.contains("step 1")),
        "{effects:?}"
    );
}

/// Where nobody is left who has a step's sum, it is computed anew, on a GPU perhaps with other bits.
#[test]
fn a_step_that_is_made_anew_may_have_another_sum() {
    let now = Instant::now();
    let (mut rounds, epoch) = running(now);
    let applied = |epoch, hash| Report::Applied { epoch, step: 0, hash: [hash; 32] };
    assert_eq!(rounds.report(FIRST, applied(epoch, 7), now), []);
    let stopped = halts(&rounds.lost(FIRST, now))[0].1;
    let effects = rounds.report(SECOND, halted(stopped, 0, true), now);
    let epoch = formed(&effects).unwrap().epoch;
    assert_eq!(rounds.report(SECOND, applied(epoch, 8), now), []);
}

#[test]
fn who_has_other_parameters_than_the_others_has_to_go() {
    let now = Instant::now();
    let told = |updates, hash| Report::Parameters { updates, hash: [hash; 32] };
    let evicted = |effects: &[RoundsEffect]| -> Vec<MemberId> {
        let member = |effect: &RoundsEffect| match effect {
            RoundsEffect::Evict { member, .. } => Some(*member),
            _ => None,
        };
        effects.iter().filter_map(member).collect()
    };
    // Of two the older one stays, whoever tells first.
    for [early, late] in [[(FIRST, 7), (SECOND, 8)], [(SECOND, 8), (FIRST, 7)]] {
        let (mut rounds, _) = running(now);
        assert_eq!(rounds.report(early.0, told(50, 7), now), []);
        assert_eq!(rounds.report(late.0, told(50, 7), now), [], "they agree");
        assert_eq!(rounds.report(early.0, told(100, early.1), now), []);
        assert_eq!(rounds.report(late.0, told(50, 9), now), [], "that is long past");
        let effects = rounds.report(late.0, told(100, late.1), now);
        assert_eq!(evicted(&effects), [SECOND]);
        assert_eq!(halts(&effects).len(), 1, "the other one goes on: {effects:?}");
    }
    // Of three the odd one goes, also the oldest.
    let (mut rounds, _) = running(now);
    let epoch = halts(&rounds.report(THIRD, Report::Ready { position: 0 }, now))[0].1;
    for member in [FIRST, SECOND, THIRD] {
        rounds.report(member, halted(epoch, 0, false), now);
    }
    assert_eq!(rounds.report(FIRST, told(1, 6), now), []);
    assert_eq!(rounds.report(SECOND, told(1, 7), now), []);
    let effects = rounds.report(THIRD, told(1, 7), now);
    assert_eq!(evicted(&effects), [FIRST]);
    assert!(effects.iter().any(
        |effect| matches!(effect, RoundsEffect::Evict { reason, .. } if reason.contains("after 1 updates"))
    ));
}

#[test]
fn a_state_that_was_written_serves_the_next_formation_too() {
    let order = |member, catch_up| Order { member, catch_up };
    let formation = |epoch, step, second| Formation {
        epoch,
        step,
        members: vec![order(FIRST, CatchUp::Nothing), order(SECOND, second)],
    };
    let answer = |effects: &[MemberEffect]| {
        effects.iter().find_map(|effect| match effect {
            MemberEffect::Answer(answer) => Some(answer.clone()),
            _ => None,
        })
    };
    let saved = |effects: &[MemberEffect]| {
        effects.iter().find_map(|effect| match effect {
            MemberEffect::Saved { epoch } => Some(*epoch),
            _ => None,
        })
    };
    let mut member = Member::new(FIRST, 4, 2);
    member.begin(5);
    member.halt(1, 0);
    assert_eq!(answer(&member.form(formation(1, 5, CatchUp::State(FIRST)))), Some(Answer::Save));
    // While the trainer writes, the one that waits for it is lost, and another one comes.
    member.halt(2, 0);
    member.form(formation(2, 5, CatchUp::State(FIRST)));
    let effects = member.begin(5);
    assert_eq!(saved(&effects), Some(2));
    assert!(matches!(answer(&effects), Some(Answer::Deal(_))), "{effects:?}");
    // The next one that comes later has it written anew.
    member.halt(3, 0);
    member.form(formation(3, 5, CatchUp::State(FIRST)));
    assert_eq!(answer(&member.begin(5)), Some(Answer::Save));
}
