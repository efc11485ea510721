//! `Jobs.Watch` and the log that is followed: what has changed since the last look, until it is over.
//!
//! Both end well only when what they follow is over. When the coordinator stops, or forgets the job, the last thing they say is that.

use super::service::JobsService;
use super::wire;
use crate::models::wire::status;
use futures::Stream;
use mlxnode_coordinator::coordinator::CoordinatorHandle;
use mlxnode_coordinator::jobs::{JobView, LogLine};
use mlxnode_proto::v1::{Job, JobLogLine, ListJobsResponse};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch::Receiver;
use tonic::Status;

/// Between two messages of a watch.
const WATCH_PERIOD: Duration = Duration::from_millis(250);
/// Between two looks at a log that is followed.
const LOG_PERIOD: Duration = Duration::from_millis(500);
/// Jobs of a message. One has at most 512 points of 27 bytes and some ten kilobytes besides: messages stay below the 4 MiB that every
/// client takes.
const JOBS_OF_A_MESSAGE: usize = 32;

type Views = Vec<Arc<JobView>>;

/// What a client knows of the jobs.
#[derive(Default)]
struct Known {
    jobs: BTreeMap<String, Arc<JobView>>,
    has_looked: bool,
}

/// What a client has to be told.
#[derive(Debug, Default, PartialEq)]
struct News {
    changed: Views,
    removed: Vec<String>,
}

impl Known {
    /// What is new in these; none when nothing is, except at the first look.
    fn news(&mut self, views: Views) -> Option<News> {
        let is_known = |view: &Arc<JobView>| {
            let known = self.jobs.get(&view.spec.id);
            known.is_some_and(|known| Arc::ptr_eq(known, view) || known == view)
        };
        let changed: Views = views.iter().filter(|view| !is_known(view)).cloned().collect();
        let now: BTreeMap<String, Arc<JobView>> =
            views.into_iter().map(|view| (view.spec.id.clone(), view)).collect();
        let removed: Vec<String> = self.jobs.keys().filter(|id| !now.contains_key(*id)).cloned().collect();
        self.jobs = now;
        let is_first = !std::mem::replace(&mut self.has_looked, true);
        (is_first || !changed.is_empty() || !removed.is_empty()).then_some(News { changed, removed })
    }
}

/// News as messages of bounded size.
fn messages(news: News, job: impl Fn(&JobView) -> Job) -> VecDeque<ListJobsResponse> {
    let mut messages: VecDeque<ListJobsResponse> = news
        .changed
        .chunks(JOBS_OF_A_MESSAGE)
        .map(|some| ListJobsResponse {
            jobs: some.iter().map(|view| job(view)).collect(),
            more: true,
            removed: Vec::new(),
        })
        .collect();
    if messages.is_empty() {
        messages.push_back(ListJobsResponse::default());
    }
    if let Some(last) = messages.back_mut() {
        last.removed = news.removed;
        last.more = false;
    }
    messages
}

struct Watching {
    jobs: Receiver<Views>,
    service: JobsService,
    id: String,
    known: Known,
    waiting: VecDeque<ListJobsResponse>,
    is_over: bool,
}

impl Watching {
    async fn next(&mut self) -> Option<Result<ListJobsResponse, Status>> {
        loop {
            if let Some(message) = self.waiting.pop_front() {
                return Some(Ok(message));
            }
            if self.is_over {
                return None;
            }
            if self.known.has_looked {
                tokio::time::sleep(WATCH_PERIOD).await;
            }
            if self.jobs.changed().await.is_err() {
                self.is_over = true;
                return Some(Err(stops()));
            }
            let mut views = self.jobs.borrow_and_update().clone();
            let is_one = !self.id.is_empty();
            if is_one {
                views.retain(|view| view.spec.id == self.id);
                let Some(view) = views.first() else {
                    self.is_over = true;
                    return Some(Err(Status::not_found(format!("the job {} is forgotten", self.id))));
                };
                self.is_over = view.state.is_over();
            }
            let service = self.service.clone();
            let job = |view: &JobView| match is_one {
                true => service.job(view),
                false => wire::in_brief(service.job(view)),
            };
            self.waiting = self.known.news(views).map(|news| messages(news, job)).unwrap_or_default();
        }
    }
}

fn stops() -> Status {
    Status::unavailable("the coordinator stops; watch again in a moment")
}

/// A job until it is over, or without an id all of them.
pub(super) fn watch(
    service: JobsService,
    coordinator: &CoordinatorHandle,
    id: String,
) -> impl Stream<Item = Result<ListJobsResponse, Status>> + use<> {
    let mut jobs = coordinator.jobs();
    jobs.mark_changed(); // the first message comes at once
    let watching =
        Watching { jobs, service, id, known: Known::default(), waiting: VecDeque::new(), is_over: false };
    futures::stream::unfold(watching, |mut watching| async move {
        let next = watching.next().await?;
        Some((next, watching))
    })
}

/// The lines of a log that were not told yet, and all that were.
#[derive(Default)]
struct Told {
    lines: Vec<LogLine>,
}

impl Told {
    /// What of a log is new. A log keeps its last lines: what went by between two looks is missing then.
    fn news(&mut self, lines: Vec<LogLine>) -> Vec<LogLine> {
        // Where what was told ends in what there is now.
        let known = (0..=self.lines.len())
            .map(|cut| &self.lines[cut..])
            .find(|rest| lines.starts_with(rest))
            .map_or(0, <[_]>::len);
        let news = lines[known..].to_vec();
        self.lines = lines;
        news
    }
}

/// The lines of a job until it is over.
pub(super) fn follow_log(
    service: JobsService,
    coordinator: CoordinatorHandle,
    id: String,
) -> impl Stream<Item = Result<JobLogLine, Status>> {
    let state = (service, coordinator, id, Told::default(), VecDeque::new(), false);
    futures::stream::unfold(
        state,
        |(service, coordinator, id, mut told, mut waiting, is_broken)| async move {
            if is_broken {
                return None;
            }
            loop {
                if let Some(line) = waiting.pop_front() {
                    let line = Ok(wire::line_to_proto(line));
                    return Some((line, (service, coordinator, id, told, waiting, false)));
                }
                // The state first: a job that is over logs no more.
                let looked = async {
                    let is_over = service.find(&coordinator, &id)?.state.is_over();
                    Ok::<_, Status>((is_over, coordinator.job_log(id.clone()).await.map_err(status)?))
                };
                let (is_over, lines) = match looked.await {
                    Ok(looked) => looked,
                    Err(status) => {
                        return Some((Err(status), (service, coordinator, id, told, waiting, true)));
                    }
                };
                waiting.extend(told.news(lines));
                if waiting.is_empty() {
                    if is_over {
                        return None;
                    }
                    tokio::time::sleep(LOG_PERIOD).await;
                }
            }
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use mlxnode_coordinator::jobs::{ContentHash, InputFile, JobKind, JobSpec, JobState, SavePolicy};

    fn view(id: &str, attempts: u32) -> Arc<JobView> {
        let input = InputFile { name: "train.jsonl".into(), hash: ContentHash::of(b""), bytes: 0 };
        Arc::new(JobView {
            spec: JobSpec {
                id: id.into(),
                kind: JobKind::FineTuning,
                model: "demo".into(),
                configuration: "x".repeat(32 << 10),
                inputs: vec![input; 32],
                memory: None,
                share: 25,
                workers: 1,
                stages: 1,
                demand: Default::default(),
                saves: SavePolicy::default(),
                publish: None,
                owner: String::new(),
                labels: Default::default(),
            },
            state: JobState::Running,
            detail: String::new(),
            submitted_at: 1,
            started_at: None,
            ended_at: None,
            attempts,
            epoch: 1,
            node: None,
            progress: Default::default(),
            curve: Vec::new(),
            checkpoints: Vec::new(),
            publications: Vec::new(),
            stages: Vec::new(),
        })
    }

    #[test]
    fn only_what_has_changed_is_told() {
        let mut known = Known::default();
        let ids = |news: Option<News>| {
            news.map(|news| {
                (news.changed.iter().map(|view| view.spec.id.clone()).collect::<String>(), news.removed)
            })
        };
        assert_eq!(ids(known.news(Vec::new())), Some((String::new(), vec![])), "the first look is told");
        assert_eq!(ids(known.news(vec![view("b", 0), view("a", 0)])), Some(("ba".into(), vec![])));
        assert_eq!(ids(known.news(vec![view("b", 0), view("a", 0)])), None);
        assert_eq!(ids(known.news(vec![view("c", 0), view("a", 1)])), Some(("ca".into(), vec!["b".into()])));
        assert_eq!(ids(known.news(Vec::new())), Some((String::new(), vec!["a".into(), "c".into()])));
    }

    struct Nowhere;

    impl crate::route::CoordinatorRoute for Nowhere {
        fn route(&self) -> Result<crate::route::Route, Status> {
            Err(Status::unavailable("nowhere"))
        }
    }

    fn watching(jobs: Receiver<Views>, id: &str) -> Watching {
        let service = JobsService::new(Arc::new(Nowhere), Arc::new(crate::jobs::NoJobFiles));
        let mut jobs = jobs;
        jobs.mark_changed();
        let (known, waiting) = (Known::default(), VecDeque::new());
        Watching { jobs, service, id: id.into(), known, waiting, is_over: false }
    }

    #[tokio::test]
    async fn a_watch_ends_well_only_when_its_job_is_over() {
        let (sender, jobs) = tokio::sync::watch::channel(vec![view("a", 0)]);
        let (mut one, mut all, mut other) =
            (watching(jobs.clone(), "a"), watching(jobs.clone(), ""), watching(jobs, "a"));
        let told = one.next().await.unwrap().unwrap();
        assert_eq!(
            told.jobs[0].wish.as_ref().unwrap().configuration.len(),
            32 << 10,
            "one job is told whole"
        );
        let told = all.next().await.unwrap().unwrap();
        assert!(told.jobs[0].wish.as_ref().unwrap().configuration.is_empty());
        other.next().await.unwrap().unwrap();
        sender.send_replace(vec![view("b", 0)]);
        assert_eq!(other.next().await.unwrap().unwrap_err().code(), tonic::Code::NotFound);
        assert!(other.next().await.is_none());
        assert_eq!(all.next().await.unwrap().unwrap().removed, ["a"]);
        let over = JobView { state: JobState::Finished, ..(*view("a", 0)).clone() };
        sender.send_replace(vec![Arc::new(over)]);
        assert_eq!(one.next().await.unwrap().unwrap().jobs.len(), 1);
        assert!(one.next().await.is_none(), "it is over");
        drop(sender);
        all.next().await.unwrap().unwrap();
        assert_eq!(all.next().await.unwrap().unwrap_err().code(), tonic::Code::Unavailable);
        assert!(all.next().await.is_none());
    }

    #[test]
    fn messages_are_of_bounded_size() {
        use prost::Message as _;
        let changed: Views = (0..256).map(|number| view(&format!("job-{number}"), 0)).collect();
        let all = messages(News { changed, removed: vec!["x".into()] }, |view| {
            let losses = (0..512).map(|step| mlxnode_proto::v1::JobLoss {
                step: step + 1_000_000,
                training: Some(1.5),
                validation: Some(2.5),
            });
            let job = wire::job_to_wire(view, &|_| String::new());
            wire::in_brief(Job { losses: losses.collect(), ..job })
        });
        assert_eq!(all.iter().map(|message| message.jobs.len()).sum::<usize>(), 256);
        let mores: Vec<bool> = all.iter().map(|message| message.more).collect();
        assert_eq!(mores, [[true; 7].as_slice(), &[false]].concat());
        assert_eq!(all[7].removed, ["x"]);
        for message in all {
            assert!(message.encoded_len() < 2 << 20, "{}", message.encoded_len());
        }
    }

    #[test]
    fn a_log_goes_on_where_it_was() {
        let line = |text: &str| LogLine { at: 1, text: text.into() };
        let texts = |lines: Vec<LogLine>| lines.into_iter().map(|line| line.text).collect::<String>();
        let mut told = Told::default();
        for (now, news) in [("ab", "ab"), ("ab", ""), ("abc", "c"), ("bcd", "d"), ("xy", "xy")] {
            let lines = now.chars().map(|letter| line(&letter.to_string())).collect();
            assert_eq!(texts(told.news(lines)), news, "{now}");
        }
    }
}
