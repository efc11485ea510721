//! What `mlxnode top` shows: tables made of the picture, in the order that the person wants, and what keys do to them.

use super::Follow;
use super::words::{bytes, loss, rate, share, span, time};
use mlxnode_api::jobs::JobView;
use mlxnode_api::picture::{DeploymentPicture, Picture, StagePicture};
use std::cmp::Ordering;
use std::collections::VecDeque;

/// One of the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pane {
    Nodes,
    Models,
    Jobs,
    Stages,
}

impl Pane {
    pub const ALL: [Self; 4] = [Self::Nodes, Self::Models, Self::Jobs, Self::Stages];

    pub fn title(self) -> &'static str {
        match self {
            Self::Nodes => "Nodes",
            Self::Models => "Models",
            Self::Jobs => "Jobs",
            Self::Stages => "Stages",
        }
    }

    /// Names of the columns; figures stand to the right.
    pub fn columns(self) -> &'static [Column] {
        match self {
            Self::Nodes => &NODES,
            Self::Models => &MODELS,
            Self::Jobs => &JOBS,
            Self::Stages => &STAGES,
        }
    }
}

const NODES: [Column; 7] = [
    Column::words("node"),
    Column::words("state"),
    Column::figure("memory"),
    Column::figure("budget"),
    Column::figure("round trip"),
    Column::words("chip"),
    Column::words("address"),
];
const MODELS: [Column; 8] = [
    Column::words("model"),
    Column::words("state"),
    Column::figure("tokens/s"),
    Column::figure("prompt/s"),
    Column::figure("running"),
    Column::figure("waiting"),
    Column::figure("KV"),
    Column::words("layers"),
];
const JOBS: [Column; 8] = [
    Column::words("job"),
    Column::words("state"),
    Column::figure("step"),
    Column::figure("loss"),
    Column::figure("tokens/s"),
    Column::figure("time left"),
    Column::words("node"),
    Column::words("model"),
];
const STAGES: [Column; 10] = [
    Column::words("model"),
    Column::words("layers"),
    Column::words("node"),
    Column::figure("busy"),
    Column::figure("compute"),
    Column::figure("wait"),
    Column::figure("send"),
    Column::figure("tokens/s"),
    Column::figure("memory"),
    Column::figure("open"),
];

/// A column of a table.
#[derive(Clone, Copy, Debug)]
pub struct Column {
    pub name: &'static str,
    pub is_figure: bool,
}

impl Column {
    const fn words(name: &'static str) -> Self {
        Self { name, is_figure: false }
    }

    const fn figure(name: &'static str) -> Self {
        Self { name, is_figure: true }
    }
}

/// A cell: what is read, and by what it is sorted.
#[derive(Clone, Debug, PartialEq)]
pub struct Cell {
    pub text: String,
    order: Option<f64>,
}

impl Cell {
    fn words(text: impl Into<String>) -> Self {
        Self { text: text.into(), order: None }
    }

    /// What is unknown comes after everything that is known.
    fn figure(text: String, value: Option<f64>) -> Self {
        Self { text, order: Some(value.unwrap_or(-1.0)) }
    }

    fn compare(&self, other: &Self) -> Ordering {
        match (self.order, other.order) {
            (Some(one), Some(two)) => one.total_cmp(&two),
            _ => self.text.cmp(&other.text),
        }
    }
}

/// A row and whether it is well.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    pub cells: Vec<Cell>,
    pub is_well: bool,
}

/// The order of a table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sorting {
    /// None: as the cluster tells it.
    pub column: Option<usize>,
    pub is_reversed: bool,
}

/// What a key asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    End,
    Help,
    NextPane,
    PreviousPane,
    Down,
    Up,
    Sort,
    Reverse,
}

/// How many of the last looks the curve shows.
const HISTORY: usize = 120;

/// The board.
#[derive(Clone, Debug, Default)]
pub struct Board {
    pub follow: Follow,
    pub focus: usize,
    pub selected: [usize; 4],
    pub sorting: [Sorting; 4],
    pub shows_help: bool,
    /// Generated tokens per second, the newest last.
    pub history: VecDeque<u64>,
}

impl Board {
    /// A newer picture. `is_look`: it is one more look, and not only the news that there are none any more.
    pub fn update(&mut self, follow: Follow) {
        if follow.lost.is_none() {
            let speed = follow.picture.totals.tokens_per_second.unwrap_or_default();
            self.history.push_back(speed.round() as u64);
            while self.history.len() > HISTORY {
                self.history.pop_front();
            }
        }
        self.follow = follow;
        self.keep_selections();
    }

    /// Carries out a wish; true when `top` shall end.
    pub fn wish(&mut self, wish: Wish) -> bool {
        let panes = Pane::ALL.len();
        let (focus, pane) = (self.focus, self.pane());
        match wish {
            Wish::End if self.shows_help => self.shows_help = false,
            Wish::End => return true,
            Wish::Help => self.shows_help = !self.shows_help,
            Wish::NextPane => self.focus = (focus + 1) % panes,
            Wish::PreviousPane => self.focus = (focus + panes - 1) % panes,
            Wish::Down => self.selected[focus] += 1,
            Wish::Up => self.selected[focus] = self.selected[focus].saturating_sub(1),
            Wish::Sort => {
                let next = self.sorting[focus].column.map_or(0, |column| column + 1);
                let column = Some(next).filter(|column| *column < pane.columns().len());
                // Figures are looked at from the largest down.
                let is_reversed = column.is_some_and(|column| pane.columns()[column].is_figure);
                self.sorting[focus] = Sorting { column, is_reversed };
            }
            Wish::Reverse => self.sorting[focus].is_reversed = !self.sorting[focus].is_reversed,
        }
        self.keep_selections();
        false
    }

    /// The table with the focus.
    pub fn pane(&self) -> Pane {
        Pane::ALL[self.focus]
    }

    /// A table in its order.
    pub fn rows(&self, pane: Pane) -> Vec<Row> {
        let mut rows = rows(&self.follow, pane);
        let sorting = Pane::ALL.iter().position(|other| *other == pane).map(|index| self.sorting[index]);
        let Some(Sorting { column, is_reversed }) = sorting else { return rows };
        if let Some(column) = column {
            rows.sort_by(|one, two| one.cells[column].compare(&two.cells[column]));
        }
        if is_reversed {
            rows.reverse();
        }
        rows
    }

    fn keep_selections(&mut self) {
        for (index, pane) in Pane::ALL.into_iter().enumerate() {
            let most = rows(&self.follow, pane).len().saturating_sub(1);
            self.selected[index] = self.selected[index].min(most);
        }
    }
}

/// All tables as text, for `--once`.
pub fn text(follow: &Follow) -> String {
    let mut text = format!("{}\n", summary(&follow.picture));
    for pane in Pane::ALL {
        let rows = rows(follow, pane);
        text.push_str(&format!("\n{}\n", pane.title().to_uppercase()));
        let columns = pane.columns();
        let width = |column: usize| {
            let cells = rows.iter().map(|row| row.cells[column].text.chars().count());
            cells.chain([columns[column].name.chars().count()]).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns.len()).map(width).collect();
        let line = |cells: Vec<&str>| {
            let padded = cells.iter().zip(&widths).zip(columns).map(|((cell, width), column)| {
                match column.is_figure {
                    true => format!("{cell:>width$}"),
                    false => format!("{cell:<width$}"),
                }
            });
            format!("{}\n", padded.collect::<Vec<_>>().join("  ").trim_end())
        };
        text.push_str(&line(columns.iter().map(|column| column.name).collect()));
        for row in &rows {
            text.push_str(&line(row.cells.iter().map(|cell| cell.text.as_str()).collect()));
        }
    }
    text
}

/// The cluster in a line.
pub fn summary(picture: &Picture) -> String {
    let totals = &picture.totals;
    let reachable = if picture.coordinator.reachable { "" } else { " (cannot be reached)" };
    format!(
        "{} · coordinator {}{reachable} · {} tokens/s · {} running, {} waiting · {} of {}",
        picture.cluster,
        picture.coordinator.name,
        rate(totals.tokens_per_second),
        totals.running,
        totals.waiting,
        bytes(totals.memory_used_bytes),
        bytes(totals.memory_budget_bytes)
    )
}

fn rows(follow: &Follow, pane: Pane) -> Vec<Row> {
    let picture = &follow.picture;
    match pane {
        Pane::Jobs => jobs(&follow.jobs),
        Pane::Nodes => nodes(picture),
        Pane::Models => models(picture),
        Pane::Stages => stages(picture),
    }
}

fn memory(count: u64) -> Cell {
    Cell::figure(bytes(count), Some(count as f64))
}

fn nodes(picture: &Picture) -> Vec<Row> {
    let here = picture.nodes.iter().find(|node| node.id == picture.node_id);
    let row = |node: &mlxnode_api::picture::NodePicture| {
        let link = here.and_then(|here| here.links.iter().find(|link| link.to == node.id));
        let trip = link.and_then(|link| link.rtt_seconds);
        let trip = match node.id == picture.node_id {
            true => Cell::figure("this node".into(), Some(0.0)),
            false => Cell::figure(time(trip), trip),
        };
        let state = node.problem.clone().unwrap_or_else(|| node.state.to_owned());
        Row {
            cells: vec![
                Cell::words(&node.name),
                Cell::words(state),
                memory(node.memory_used_bytes),
                memory(node.memory_budget_bytes),
                trip,
                Cell::words(&node.chip),
                Cell::words(&node.address),
            ],
            is_well: node.state == "alive",
        }
    };
    picture.nodes.iter().map(row).collect()
}

fn models(picture: &Picture) -> Vec<Row> {
    let row = |deployment: &DeploymentPicture| {
        let count = |count: u64| Cell::figure(count.to_string(), Some(count as f64));
        let state = match deployment.detail.as_str() {
            "" => deployment.state.to_owned(),
            detail => format!("{}: {detail}", deployment.state),
        };
        let layers = deployment.stages.iter().map(|stage| format!("{} {}", stage.node, layers(stage)));
        Row {
            cells: vec![
                Cell::words(named(deployment)),
                Cell::words(state),
                Cell::figure(rate(deployment.tokens_per_second), deployment.tokens_per_second),
                Cell::figure(rate(deployment.prompt_tokens_per_second), deployment.prompt_tokens_per_second),
                count(deployment.running),
                count(deployment.waiting),
                Cell::figure(share(deployment.kv_usage), deployment.kv_usage),
                Cell::words(layers.collect::<Vec<_>>().join(" → ")),
            ],
            is_well: deployment.state == "ready",
        }
    };
    picture.deployments.iter().map(row).collect()
}

fn jobs(jobs: &[JobView]) -> Vec<Row> {
    let row = |job: &JobView| {
        let is_running = job.state == "running";
        let state = match job.detail.as_str() {
            "" => job.state.clone(),
            detail => format!("{}: {detail}", job.state),
        };
        let step = match job.steps {
            0 => Cell::figure("–".into(), None),
            steps => Cell::figure(format!("{} of {steps}", job.step), Some(job.step as f64)),
        };
        let speed = Some(job.tokens_per_second).filter(|speed| is_running && *speed > 0.0);
        let model = match job.served_as.as_slice() {
            [] => job.model.clone(),
            names => format!("{} → {}", job.model, names.join(", ")),
        };
        Row {
            cells: vec![
                Cell::words(&job.id),
                Cell::words(state),
                step,
                Cell::figure(loss(job.last_loss()), job.last_loss()),
                Cell::figure(rate(speed), speed),
                Cell::figure(span(job.seconds_left), job.seconds_left),
                Cell::words(&job.node),
                Cell::words(model),
            ],
            is_well: !matches!(job.state.as_str(), "failed" | "waiting for nodes"),
        }
    };
    jobs.iter().map(row).collect()
}

fn stages(picture: &Picture) -> Vec<Row> {
    let mut rows = Vec::new();
    for deployment in &picture.deployments {
        for stage in &deployment.stages {
            let figures = stage.figures.as_ref();
            let rates = figures.and_then(|figures| figures.rates.as_ref());
            let seconds = |value: Option<f64>| Cell::figure(time(value), value);
            let speed = rates.map(|rates| rates.tokens_per_second + rates.prompt_tokens_per_second);
            let busy = rates.map(|rates| rates.busy);
            let open = figures.map(|figures| figures.open_sequences);
            rows.push(Row {
                cells: vec![
                    Cell::words(named(deployment)),
                    Cell { order: Some(stage.layer_start.into()), ..Cell::words(layers(stage)) },
                    Cell::words(&stage.node),
                    Cell::figure(share(busy), busy),
                    seconds(rates.map(|rates| rates.compute_seconds)),
                    seconds(rates.map(|rates| rates.wait_seconds)),
                    seconds(rates.map(|rates| rates.send_seconds)),
                    Cell::figure(rate(speed), speed),
                    figures.map_or_else(
                        || Cell::figure("–".into(), None),
                        |figures| memory(figures.memory_bytes),
                    ),
                    Cell::figure(
                        open.map_or_else(|| "–".into(), |open| open.to_string()),
                        open.map(|open| open as f64),
                    ),
                ],
                is_well: figures.is_some(),
            });
        }
    }
    rows
}

/// With its number where there are several.
fn named(deployment: &DeploymentPicture) -> String {
    match deployment.replicas {
        0 | 1 => deployment.model.clone(),
        all => format!("{} ({} of {all})", deployment.model, deployment.replica),
    }
}

fn layers(stage: &StagePicture) -> String {
    format!("{}..{}", stage.layer_start, stage.layer_end)
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use mlxnode_api::jobs::LossPoint;
    use mlxnode_api::picture::{
        Coordinator, DeploymentFacts, Link, NodeFacts, NodePicture, StageFacts, StageFigures, StageRates,
        Totals,
    };

    /// Two nodes, two models; the second node does not say what it does.
    pub fn example() -> Follow {
        let node = |id: &str, name: &str, state, used| NodePicture {
            facts: NodeFacts {
                id: id.into(),
                name: name.into(),
                state,
                memory_used_bytes: used,
                memory_budget_bytes: 48_000_000_000,
                chip: "Apple M4 Max".into(),
                address: "10.0.0.7:7420".into(),
                links: vec![Link { to: "b".into(), rtt_seconds: Some(0.000_4) }],
                ..NodeFacts::default()
            },
            answers: false,
        };
        let figures = |busy| StageFigures {
            rates: Some(StageRates {
                busy,
                compute_seconds: 0.012,
                wait_seconds: 0.001,
                send_seconds: 0.000_3,
                tokens_per_second: 81.0,
                ..StageRates::default()
            }),
            open_sequences: 3,
            memory_bytes: 9_000_000_000,
            ..StageFigures::default()
        };
        let stage = |node: &str, start, end, figures| StagePicture {
            facts: StageFacts {
                node: node.into(),
                layer_start: start,
                layer_end: end,
                ..StageFacts::default()
            },
            figures,
        };
        let model = |name: &str, speed, stages| DeploymentPicture {
            facts: DeploymentFacts { model: name.into(), state: "ready", ..DeploymentFacts::default() },
            tokens_per_second: speed,
            running: 3,
            stages,
            ..DeploymentPicture::default()
        };
        let picture = Picture {
            cluster: "Desk".into(),
            node_id: "a".into(),
            coordinator: Coordinator { name: "studio".into(), reachable: true, ..Coordinator::default() },
            nodes: vec![node("a", "studio", "alive", 20_000_000_000), node("b", "mini", "dead", 1_000_000)],
            deployments: vec![
                model(
                    "qwen",
                    Some(81.0),
                    vec![stage("studio", 0, 9, Some(figures(0.9))), stage("mini", 9, 36, None)],
                ),
                model("demo", None, vec![stage("studio", 0, 6, Some(figures(0.2)))]),
            ],
            totals: Totals {
                running: 6,
                waiting: 1,
                tokens_per_second: Some(81.0),
                memory_budget_bytes: 96_000_000_000,
                memory_used_bytes: 20_001_000_000,
                ..Totals::default()
            },
            ..Picture::default()
        };
        let job = |id: &str, state: &str| JobView {
            id: id.into(),
            model: "demo".into(),
            state: state.into(),
            step: 30,
            steps: 200,
            tokens_per_second: 512.0,
            losses: vec![LossPoint { step: 30, training: Some(1.234_56), validation: None }],
            ..JobView::default()
        };
        let running = JobView { node: "mini".into(), seconds_left: Some(754.0), ..job("poet", "running") };
        let failed = JobView { detail: "the loss is not finite".into(), ..job("other", "failed") };
        Follow { picture, jobs: vec![running, failed], lost: None }
    }

    fn column(board: &Board, pane: Pane, column: usize) -> Vec<String> {
        board.rows(pane).iter().map(|row| row.cells[column].text.clone()).collect()
    }

    #[test]
    fn tables_are_sorted_as_wished_and_what_is_unknown_comes_last() {
        let mut board = Board::default();
        board.update(example());
        board.wish(Wish::PreviousPane);
        assert_eq!(board.pane(), Pane::Stages);
        let by = |board: &mut Board, name: &str| {
            let pane = board.pane();
            for _ in 0..pane.columns().len() {
                board.wish(Wish::Sort);
                if board.sorting[board.focus].column.map(|column| pane.columns()[column].name) == Some(name) {
                    return;
                }
            }
            panic!("no column {name}");
        };
        by(&mut board, "busy");
        assert_eq!(column(&board, Pane::Stages, 3), ["90 %", "20 %", "–"]);
        board.wish(Wish::Reverse);
        assert_eq!(column(&board, Pane::Stages, 3), ["–", "20 %", "90 %"]);
        by(&mut board, "layers");
        assert_eq!(column(&board, Pane::Stages, 1), ["0..9", "0..6", "9..36"]);
        assert_eq!(column(&board, Pane::Nodes, 0), ["studio", "mini"], "other tables keep their order");
    }

    #[test]
    fn the_selection_stays_within_its_table() {
        let mut board = Board::default();
        for _ in 0..9 {
            board.wish(Wish::Down);
        }
        assert_eq!(board.selected, [0, 0, 0, 0]);
        board.update(example());
        for _ in 0..9 {
            board.wish(Wish::Down);
        }
        assert_eq!(board.selected, [1, 0, 0, 0]);
        board.update(Follow::default());
        assert_eq!(board.selected, [0, 0, 0, 0], "a table that shrinks takes it along");
        assert_eq!(board.history.len(), 2);
    }

    #[test]
    fn help_is_closed_before_the_end() {
        let mut board = Board::default();
        assert!(!board.wish(Wish::Help) && board.shows_help);
        assert!(!board.wish(Wish::End) && !board.shows_help);
        assert!(board.wish(Wish::End));
    }

    #[test]
    fn a_look_as_text_has_every_row() {
        let text = text(&example());
        for words in [
            "JOBS",
            "poet",
            "30 of 200",
            "1.235",
            "13 min",
            "failed: the loss is not finite",
            "Desk · coordinator studio · 81.0 tokens/s",
            "mini",
            "9..36",
            "12.00 ms",
            "300 µs",
            "dead",
        ] {
            assert!(text.contains(words), "no {words} in\n{text}");
        }
    }
}
