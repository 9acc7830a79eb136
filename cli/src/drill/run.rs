//! A drill from begin to end: one quiet run, the same load again under faults, and what both show.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::bail;
use entente_proto::ids::{Incarnation, NodeName};

use super::board::Board;
use super::control::Log;
use super::figures::{self, Answer, Spread, Struck};
use super::history;
use super::place::{Place, Server};
use super::report::{Failure, Report};
use super::scenario::{Action, Pace, Scenario, Way};
use super::schedule::{Due, Schedule, Timing};
use super::stale::Stale;
use super::strike::Striker;
use super::target;
use super::verdict::{Figures, judge};
use super::watch::{POLL_INTERVAL, Rows, Watch, stolen_ms};
use crate::client::Client;
use crate::cluster::data_dir::ProcessEntry;
use crate::cluster::plan::Role;
use crate::cluster::relay::control;
use crate::cluster::relay::traffic::Traffic;
use crate::exit::Misuse;
use crate::load::{self, Mix, Outcome, Request, Sender};
use crate::random::Random;

/// How long a cluster may take to be ready after a strike, and a process to be back.
const RECOVERY_DEADLINE: Duration = Duration::from_secs(60);

/// How often it is looked whether a process is back.
const BACK_INTERVAL: Duration = Duration::from_millis(50);

/// Sessions that make changes where their history is looked at.
const WRITERS: usize = 2;

/// Requests at once in the quiet run of an open loop, and at most in its run under faults.
const QUIET_STREAMS: usize = 32;
const RUNNING_MAX: usize = 2_000;

/// What a run left behind.
struct Run {
    answers: Vec<Answer>,
    struck: Vec<Struck>,
    hedged_share: Option<f64>,
    stolen_ms: Option<f64>,
    stale: Option<Stale>,
    cut_bytes: Option<u64>,
    control: Log,
}

/// One start of a process: what the system and what the cluster call it.
#[derive(Debug, Clone, Copy)]
struct Start {
    pid: Option<u32>,
    incarnation: Option<Incarnation>,
}

impl Start {
    /// Whether this is a later start, of which the cluster has heard if it heard of the other one.
    /// Until then it takes the process that is gone for one that serves.
    fn is_after(self, other: Self) -> bool {
        let known = other.incarnation.is_none() || self.incarnation != other.incarnation;
        self.pid.is_some() && self.pid != other.pid && known
    }
}

/// Where a run began, for what is counted by others from their own start.
struct Begin {
    rows: Rows,
    stolen_ms: Option<f64>,
}

/// One drill on one cluster.
pub struct Drill<'a> {
    scenario: &'a Scenario,
    place: &'a Place,
    watch: Watch,
    servers: Vec<Server>,
    clients: Vec<Client>,
    requests: Vec<Request>,
    /// Whom each strike of each fault is for.
    strikes: Vec<Vec<Vec<NodeName>>>,
}

impl<'a> Drill<'a> {
    /// Finds the cluster's coordinators and draws everything that the seed names.
    ///
    /// # Errors
    /// When the scenario asks for what this cluster does not have.
    pub fn new(scenario: &'a Scenario, place: &'a Place) -> anyhow::Result<Self> {
        let load = &scenario.load;
        let servers: Vec<Server> =
            place.servers()?.into_iter().filter(|server| load.is_for(server)).collect();
        let Some(first) = servers.first() else {
            bail!(Misuse("the cluster has no coordinator in the regions of the load".to_owned()))
        };
        let mix = Mix::new(load.seed, first.client.model(), load.prompts, load.output());
        let mix = mix.within(load.residency.clone());
        let processes = place.processes()?;
        let mut random = Random::new(!load.seed);
        let strikes =
            scenario.faults.iter().map(|fault| target::strikes(fault, &processes, &mut random));
        let strikes = strikes.collect::<Result<_, Misuse>>()?;
        let requests = mix.take(load.distinct()).collect();
        let within = |server: &Server| server.client.clone().with_deadline(load.deadline.0);
        let clients = servers.iter().map(within).collect();
        let watch = Watch::new(place)?;
        Ok(Self { scenario, place, watch, servers, clients, requests, strikes })
    }

    /// Runs the load twice and compares.
    ///
    /// # Errors
    /// When there is nothing to compare with: the cluster is not well, or somebody interrupts.
    pub fn run(&self, board: &Board, tell: &(impl Fn(&str) + Sync)) -> anyhow::Result<Report> {
        tell(&format!("undisturbed: {} requests", self.requests.len()));
        let traffic = self.traffic();
        let quiet = self.quiet(board)?;
        if let Some(failed) = quiet.answers.iter().find(|answer| answer.error.is_some()) {
            let error = failed.error.as_deref().unwrap_or_default();
            bail!("the undisturbed run failed already: request {}: {error}", failed.request);
        }
        tell("under faults");
        let mut disturbed = self.disturbed(board, tell)?;
        let passed_bytes = self.passed_bytes(&traffic);
        let figures = Figures { passed_bytes, ..self.figures(&quiet, &disturbed) };
        self.blame(&mut disturbed, figures.usual_gap_ms);
        let checks = judge(&self.scenario.expect, &figures);
        Ok(Report {
            scenario: self.scenario.name.clone(),
            proves: self.scenario.proves.clone(),
            seed: self.scenario.load.seed,
            passed: checks.iter().all(|check| check.ok),
            checks,
            failures: Failure::list(&disturbed.answers, &disturbed.struck, &self.servers),
            strikes: disturbed.struck,
            figures,
        })
    }

    /// Every different request once.
    fn quiet(&self, board: &Board) -> anyhow::Result<Run> {
        let streams = match self.scenario.load.pace()? {
            Pace::Closed { streams } => streams,
            Pace::Open { .. } => QUIET_STREAMS,
        };
        let before = self.begin(board);
        let on_piece = |tokens| board.saw(tokens);
        let sender = Sender { servers: &self.clients, on_piece: &on_piece };
        let sent = AtomicUsize::new(0);
        let next = || {
            let next = self.requests.get(sent.fetch_add(1, Ordering::Relaxed));
            next.filter(|_| !board.lock().interrupted).cloned()
        };
        let outcomes = sender.closed_loop(streams, next);
        self.ended(board, outcomes, &before)
    }

    /// The load for as long as it is to last and strikes are made.
    fn disturbed(&self, board: &Board, tell: &(impl Fn(&str) + Sync)) -> anyhow::Result<Run> {
        let before = self.begin(board);
        let writers = if self.scenario.expect.changes_linearizable { WRITERS } else { 0 };
        let (outcomes, control) = thread::scope(|scope| {
            let load = scope.spawn(|| self.load(board));
            let control = scope.spawn(|| self.watch.log(board, writers));
            self.strike_all(board, tell);
            let joined = (load.join(), control.join());
            (joined.0.expect("asking does not panic"), joined.1.expect("nor does listening"))
        });
        Ok(Run { control: control?, ..self.ended(board, outcomes?, &before)? })
    }

    fn load(&self, board: &Board) -> anyhow::Result<Vec<Outcome>> {
        let (requests_min, least) = self.scenario.load.least();
        let sent = AtomicUsize::new(0);
        let next = || {
            let number = sent.fetch_add(1, Ordering::Relaxed);
            let enough = number >= requests_min && board.start().elapsed() >= least;
            let state = board.lock();
            let more = !(state.interrupted || enough && state.finished);
            more.then(|| self.requests[number % self.requests.len()].clone())
        };
        let on_piece = |tokens| board.saw(tokens);
        let sender = Sender { servers: &self.clients, on_piece: &on_piece };
        Ok(match self.scenario.load.pace()? {
            Pace::Closed { streams } => sender.closed_loop(streams, next),
            Pace::Open { rate } => {
                let requests = std::iter::from_fn(next);
                let arrivals = load::arrivals(self.scenario.load.seed, rate, requests);
                sender.open_loop(arrivals, RUNNING_MAX)
            }
        })
    }

    fn begin(&self, board: &Board) -> Begin {
        let begin = Begin { rows: self.watch.rows(), stolen_ms: stolen_ms() };
        board.begin();
        begin
    }

    fn ended(&self, board: &Board, outcomes: Vec<Outcome>, before: &Begin) -> anyhow::Result<Run> {
        let mut state = board.lock();
        if state.interrupted {
            bail!(crate::exit::Interrupted);
        }
        let struck = std::mem::take(&mut state.struck);
        let (stale, cut_bytes) = (state.stale, state.cut_bytes);
        drop(state);
        let start = board.start();
        let hedged_share = self.watch.rows().hedged_share_since(&before.rows);
        let stolen_ms = stolen_ms().zip(before.stolen_ms).map(|(now, then)| now - then);
        let answers = outcomes.into_iter().map(|outcome| answer(outcome, start)).collect();
        let control = Log::default();
        Ok(Run { answers, struck, hedged_share, stolen_ms, stale, cut_bytes, control })
    }

    /// Makes every strike when it is due, and returns when the effects of the last one are over.
    fn strike_all(&self, board: &Board, tell: &(impl Fn(&str) + Sync)) {
        let striker = Striker::new(self.place, board, self.watch.control());
        let faults = || self.scenario.faults.iter();
        let timings = faults().zip(&self.strikes).map(|(fault, strikes)| Timing {
            at: fault.at,
            every: fault.every,
            strikes: strikes.len(),
        });
        let mut schedule = Schedule::new(timings);
        let total: usize = self.strikes.iter().map(Vec::len).sum();
        thread::scope(|scope| {
            loop {
                let seen = board.changes();
                let over = std::mem::take(&mut board.lock().over);
                over.into_iter().for_each(|fault| schedule.over(fault));
                while let Some(due) = schedule.due(board.now()) {
                    let striker = &striker;
                    scope.spawn(move || self.strike(striker, board, due, tell));
                }
                if self.is_over(board, total) {
                    break;
                }
                let now_ms = board.now().ms;
                let next = schedule.next_ms().map(|ms| ms.saturating_sub(now_ms));
                let longest = Duration::from_millis(next.unwrap_or(u64::MAX).clamp(1, 100));
                board.wait(seen, schedule.next_tokens().unwrap_or(u64::MAX), longest);
            }
            // Whoever still waits for a process to be back waits for nothing.
            board.tell(|state| state.finished = true);
        });
    }

    /// Whether nothing more is to come: all strikes were made and their windows have passed, one
    /// could not be made, or somebody interrupts.
    fn is_over(&self, board: &Board, total: usize) -> bool {
        let window_ms = self.scenario.expect.window.0.as_secs_f64() * 1e3;
        let now_ms = board.ms();
        let state = board.lock();
        let passed = |strike: &Struck| now_ms >= strike.at_ms + strike.lasts_ms + window_ms;
        let all = state.struck.len() == total && state.struck.iter().all(passed);
        all || state.interrupted || state.struck.iter().any(|strike| strike.error.is_some())
    }

    /// Makes one strike, waits until the cluster is ready again, and then until what it ended is
    /// back.
    fn strike(&self, striker: &Striker<'_>, board: &Board, due: Due, tell: &impl Fn(&str)) {
        let actions = &self.scenario.faults[due.fault].actions.0;
        let mut names = self.strikes[due.fault][due.number].clone();
        if actions.contains(&(Action::KillLeader {})) {
            names.extend(self.watch.leader());
        }
        let before = self.starts(&names);
        let mut struck = self.begun(due, &names, board);
        tell(&struck.to_string());
        let done = actions.iter().try_for_each(|action| striker.act(action, &names));
        struck.lasts_ms = board.ms() - struck.at_ms;
        match done {
            Err(error) => struck.error = Some(format!("{error:#}")),
            Ok(()) => {
                let recovered = || self.watch.has_recovered(actions);
                let recovered = wait_until(board, POLL_INTERVAL, recovered);
                struck.recovery_ms = recovered.then(|| board.ms() - struck.at_ms - struck.lasts_ms);
            }
        }
        board.tell(|state| state.struck.push(struck));
        let ends = actions.iter().any(Action::ends_process);
        let back = || {
            let again = self.starts(&names);
            let anew = before.iter().zip(&again).all(|(old, new)| new.is_after(*old));
            (!ends || anew) && self.watch.is_whole()
        };
        let back = wait_until(board, BACK_INTERVAL, back);
        let now_ms = board.ms();
        board.tell(|state| {
            let finished = state.finished;
            let same =
                |struck: &&mut Struck| (struck.fault, struck.number) == (due.fault, due.number);
            let Some(struck) = state.struck.iter_mut().find(same) else { return };
            struck.back_ms = back.then_some(now_ms);
            let more = due.number + 1 < self.strikes[due.fault].len();
            if !back && more && !finished {
                let text = format!("the cluster was not whole again in {RECOVERY_DEADLINE:?}");
                struck.error = Some(text);
            }
            state.over.push(due.fault);
        });
    }

    /// A strike that is being made.
    fn begun(&self, due: Due, names: &[NodeName], board: &Board) -> Struck {
        let actions = &self.scenario.faults[due.fault].actions.0;
        let ends = actions.iter().any(Action::ends_process);
        let ended = |server: &Server| server.name.as_ref().is_some_and(|name| names.contains(name));
        let servers = self.servers.iter().enumerate().filter(|(_, server)| ends && ended(server));
        let words: Vec<String> = actions.iter().map(Action::words).collect();
        Struck {
            fault: due.fault,
            number: due.number,
            action: words.join(", "),
            targets: names.iter().map(NodeName::to_string).collect(),
            servers_near: self.servers_near(names),
            servers_ended: servers.map(|(number, _)| number).collect(),
            at_ms: board.ms(),
            ..Struck::default()
        }
    }

    /// The coordinators that use these expert nodes: those of their regions. None in particular
    /// when others are among them, who may matter to everyone.
    fn servers_near(&self, names: &[NodeName]) -> Vec<usize> {
        let process = |name| self.place.process(name).ok();
        let struck: Vec<ProcessEntry> = names.iter().filter_map(process).collect();
        if struck.iter().any(|process| process.role != Role::ExpertNode) {
            return Vec::new();
        }
        let is_near =
            |server: &Server| struck.iter().any(|process| server.region == Some(process.region));
        let servers = self.servers.iter().enumerate().filter(|(_, server)| is_near(server));
        servers.map(|(number, _)| number).collect()
    }

    /// Which start of each of these processes it is now.
    fn starts(&self, names: &[NodeName]) -> Vec<Start> {
        let start = |name| Start {
            pid: self.place.process(name).ok().map(|process| process.pid),
            incarnation: self.watch.incarnation(name),
        };
        names.iter().map(start).collect()
    }

    /// What has passed through the relay; nothing where there is none, or it does not matter.
    fn traffic(&self) -> Vec<Traffic> {
        let asked = !self.scenario.expect.no_bytes.is_empty();
        let data_dir = self.place.data_dir().filter(|_| asked);
        data_dir.and_then(|dir| control::traffic(dir).ok()).unwrap_or_default()
    }

    /// Bytes since `before` on each way on which none may pass; nothing for a way that does not lead
    /// through the relay.
    fn passed_bytes(&self, before: &[Traffic]) -> Vec<(String, Option<u64>)> {
        let now = self.traffic();
        let processes = self.place.processes().unwrap_or_default();
        let passed = |way: &Way| {
            let [from, to] = [&way.from, &way.to].map(|end| target::matching(end, &processes));
            let is_on = |one: &&Traffic| from.contains(&one.dialler) && to.contains(&one.target);
            let bytes = |traffic: &[Traffic]| {
                traffic.iter().filter(is_on).map(Traffic::bytes).reduce(|a, b| a + b)
            };
            (way.to_string(), bytes(&now).zip(bytes(before)).map(|(now, before)| now - before))
        };
        self.scenario.expect.no_bytes.iter().map(passed).collect()
    }

    /// Notes with each strike which stream it held up for longest, and when.
    fn blame(&self, run: &mut Run, usual_gap_ms: Option<f64>) {
        let Some(usual_ms) = usual_gap_ms else { return };
        let window_ms = self.scenario.expect.window.0.as_secs_f64() * 1e3;
        for strike in &mut run.struck {
            let stalls = figures::stalls(&run.answers, strike, window_ms, usual_ms).into_iter();
            strike.longest_stall = stalls.max_by(|a, b| a.added_ms.total_cmp(&b.added_ms));
        }
    }

    fn figures(&self, quiet: &Run, disturbed: &Run) -> Figures {
        let (answers, struck) = (&disturbed.answers, &disturbed.struck);
        let Log { epochs, writes, moves } = &disturbed.control;
        let window_ms = self.scenario.expect.window.0.as_secs_f64() * 1e3;
        let failed = answers.iter().filter(|answer| answer.error.is_some());
        let lost = failed.clone().filter(|answer| figures::lost_its_server(answer, struck)).count();
        let placebos = figures::placebos(&quiet.answers, struck.len());
        let quiet_gap_ms = figures::usual_gap_ms(&quiet.answers, &[], 0.0);
        let usual_gap_ms = figures::usual_gap_ms(answers, struck, window_ms).or(quiet_gap_ms);
        let stall = |answers: &[Answer], strikes: &[Struck], usual_ms: Option<f64>| {
            Spread::of(&figures::added_stalls_ms(answers, strikes, window_ms, usual_ms?))
        };
        let recoveries: Vec<f64> = struck.iter().filter_map(|strike| strike.recovery_ms).collect();
        let quiet_ms = quiet.answers.iter().map(|answer| answer.ended_ms).fold(0.0, f64::max);
        Figures {
            requests: answers.len(),
            failed: failed.count() - lost,
            failed_with_coordinator: lost,
            strikes: self.strikes.iter().map(Vec::len).sum(),
            struck: struck.iter().filter(|strike| strike.error.is_none()).count(),
            differences: Some(figures::differences(answers, &quiet.answers)),
            usual_gap_ms,
            added_stall_ms: stall(answers, struck, usual_gap_ms),
            added_stall_undisturbed_ms: stall(&quiet.answers, &placebos, quiet_gap_ms),
            recovery_ms: Spread::of(&recoveries),
            never_recovered: struck.len() - recoveries.len(),
            tokens_s: figures::throughput_tokens_s(answers, struck, window_ms),
            tokens_s_undisturbed: figures::tokens_s(&quiet.answers, 0.0, quiet_ms),
            hedged_share_undisturbed: quiet.hedged_share,
            hedged_share: disturbed.hedged_share,
            stolen_ms: disturbed.stolen_ms,
            stale: disturbed.stale,
            passed_bytes: Vec::new(),
            cut_bytes: disturbed.cut_bytes,
            epochs_back: (!epochs.is_empty()).then(|| history::epochs_back(epochs)),
            moves: (!epochs.is_empty()).then_some(*moves),
            changes: writes.iter().filter(|write| write.revision.is_some()).count(),
            changes_unknown: writes.iter().filter(|write| write.revision.is_none()).count(),
            changes_out_of_order: history::out_of_order(writes),
        }
    }
}

/// Looks until something holds; whether it did in time.
fn wait_until(board: &Board, interval: Duration, holds: impl Fn() -> bool) -> bool {
    let start = Instant::now();
    loop {
        if holds() {
            return true;
        }
        let ends = board.wait_for(interval, |state| state.interrupted || state.finished);
        if ends || start.elapsed() > RECOVERY_DEADLINE {
            return false;
        }
    }
}

/// An outcome, its times counted from `start`.
fn answer(outcome: Outcome, start: Instant) -> Answer {
    let ms = |at: Instant| at.saturating_duration_since(start).as_secs_f64() * 1e3;
    let began_ms = ms(outcome.due);
    let short = (outcome.tokens() < outcome.output_tokens)
        .then(|| format!("ended after {} of {} tokens", outcome.tokens(), outcome.output_tokens));
    Answer {
        request: outcome.index,
        server: outcome.server,
        began_ms,
        ended_ms: ms(outcome.ended),
        pieces: outcome.pieces.iter().map(|(at_ms, n)| (began_ms + at_ms, *n)).collect(),
        error: outcome.error.or(short),
        token_ids: outcome.token_ids,
        text: outcome.text,
    }
}
