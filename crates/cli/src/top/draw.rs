//! The board on a screen of any size.

use super::board::{Board, Pane, summary};
use ratatui::Frame;
use ratatui::layout::{Alignment, Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span, Text};
use ratatui::widgets::{Block, Borders, Cell, Clear, Paragraph, Row, Sparkline, Table, TableState};

/// Below this width there is no place for the curve.
const NARROW: u16 = 70;
/// A table's frame and head.
const FRAME: u16 = 3;

/// Draws everything.
pub fn draw(frame: &mut Frame<'_>, board: &Board) {
    let area = frame.area();
    let [top, middle, bottom] =
        Layout::vertical([Constraint::Length(2), Constraint::Min(0), Constraint::Length(1)]).areas(area);
    head(frame, board, top);
    tables(frame, board, middle);
    let hint = match &board.follow.lost {
        Some(reason) => {
            Line::styled(format!(" no news: {reason}; trying again"), Style::new().fg(Color::Red))
        }
        None => Line::styled(
            " q end   ? help   Tab next table   ↑ ↓ select   s sort   r reverse",
            Style::new().add_modifier(Modifier::DIM),
        ),
    };
    frame.render_widget(Paragraph::new(hint), bottom);
    if board.shows_help {
        help(frame, area);
    }
}

fn head(frame: &mut Frame<'_>, board: &Board, area: Rect) {
    let wide = area.width >= NARROW;
    let [words, curve] =
        Layout::horizontal([Constraint::Min(0), Constraint::Length(if wide { 24 } else { 0 })]).areas(area);
    let line = Line::from(vec![
        Span::styled(" mlxnode ", Style::new().add_modifier(Modifier::BOLD)),
        Span::raw(summary(&board.follow.picture)),
    ]);
    frame.render_widget(Paragraph::new(line), words);
    if wide {
        let room = usize::from(curve.width);
        let skipped = board.history.len().saturating_sub(room);
        let shown: Vec<u64> = board.history.iter().skip(skipped).copied().collect();
        frame.render_widget(Sparkline::default().data(&shown).style(Style::new().fg(Color::Cyan)), curve);
    }
}

/// Each table gets the rows that it has; when the screen is too small for all, the one with the focus gets most.
fn tables(frame: &mut Frame<'_>, board: &Board, area: Rect) {
    let wanted = Pane::ALL.map(|pane| u16::try_from(board.rows(pane).len()).unwrap_or(u16::MAX).max(1));
    let all = wanted.iter().fold(0u16, |sum, rows| sum.saturating_add(rows.saturating_add(FRAME)));
    // As many rows of each other table as leave room for a few of this one; at least its name.
    let others = (0..=2_u16).rev().find(|rows| {
        let sizes = wanted.iter().enumerate().map(|(index, wanted)| match index == board.focus {
            true => FRAME + 2,
            false => FRAME + wanted.min(rows),
        });
        sizes.sum::<u16>() <= area.height
    });
    let constraints = Pane::ALL.iter().enumerate().map(|(index, _)| {
        let is_last = index + 1 == Pane::ALL.len();
        match (all <= area.height, index == board.focus) {
            (true, _) if is_last => Constraint::Min(FRAME),
            (true, _) => Constraint::Length(wanted[index].saturating_add(FRAME)),
            (false, true) => Constraint::Min(FRAME + 2),
            (false, false) => Constraint::Length(others.map_or(1, |rows| FRAME + wanted[index].min(rows))),
        }
    });
    let areas = Layout::vertical(constraints.collect::<Vec<_>>()).split(area);
    for (index, pane) in Pane::ALL.into_iter().enumerate() {
        if let Some(area) = areas.get(index) {
            table(frame, board, index, pane, *area);
        }
    }
}

fn table(frame: &mut Frame<'_>, board: &Board, index: usize, pane: Pane, area: Rect) {
    let (rows, columns) = (board.rows(pane), pane.columns());
    let has_focus = index == board.focus;
    let sorting = board.sorting[index];
    let aligned = |text: String, is_figure: bool| {
        let alignment = if is_figure { Alignment::Right } else { Alignment::Left };
        Cell::from(Text::from(text).alignment(alignment))
    };
    let head = columns.iter().enumerate().map(|(at, column)| {
        let arrow = match (sorting.column == Some(at), sorting.is_reversed) {
            (true, true) => " ▼",
            (true, false) => " ▲",
            _ => "",
        };
        aligned(format!("{}{arrow}", column.name), column.is_figure)
    });
    let head = Row::new(head).style(Style::new().add_modifier(Modifier::DIM));
    let widths: Vec<Constraint> = columns
        .iter()
        .enumerate()
        .map(|(at, column)| {
            let cells = rows.iter().map(|row| row.cells[at].text.chars().count());
            let widest = cells.chain([column.name.chars().count() + 2]).max().unwrap_or(0);
            Constraint::Length(u16::try_from(widest).unwrap_or(u16::MAX).min(48))
        })
        .collect();
    let shown: Vec<Row<'_>> = match rows.is_empty() {
        true => vec![Row::new([empty(pane)])],
        false => rows
            .iter()
            .map(|row| {
                let cells = row
                    .cells
                    .iter()
                    .zip(columns)
                    .map(|(cell, column)| aligned(cell.text.clone(), column.is_figure));
                let style = if row.is_well { Style::new() } else { Style::new().fg(Color::Yellow) };
                Row::new(cells).style(style)
            })
            .collect(),
    };
    let widths = if rows.is_empty() { vec![Constraint::Min(0)] } else { widths };
    let border =
        if has_focus { Style::new().fg(Color::Cyan) } else { Style::new().add_modifier(Modifier::DIM) };
    let block = Block::new().borders(Borders::TOP).border_style(border).title(format!(" {} ", pane.title()));
    let mut table = Table::new(shown, widths).block(block).column_spacing(2);
    if !rows.is_empty() {
        table = table.header(head);
    }
    let mut state = TableState::default();
    if has_focus && !rows.is_empty() {
        state.select(Some(board.selected[index]));
        table = table.row_highlight_style(Style::new().add_modifier(Modifier::REVERSED));
    }
    frame.render_stateful_widget(table, area, &mut state);
}

fn empty(pane: Pane) -> &'static str {
    match pane {
        Pane::Nodes => "none",
        Pane::Jobs => "there is no job; `mlxnode jobs submit lora.yaml` submits one",
        Pane::Models | Pane::Stages => "no model is loaded; `mlxnode load MODEL` loads one",
    }
}

fn help(frame: &mut Frame<'_>, area: Rect) {
    let lines = [
        "q, Escape        end (or close this)",
        "Tab, Shift-Tab   next and previous table",
        "↑ ↓, j k         select a row",
        "s                sort by the next column",
        "r                the other way round",
        "",
        "tokens/s   generated, since the look before",
        "busy       part of the time that a stage computes",
        "compute    of one step",
        "wait       of a batch before its step",
        "send       of what a step made, to the next stage",
        "loss       the last of what a job learns from",
        "KV         promised part of the reserved memory",
        "–          not known",
    ];
    let width = 56.min(area.width);
    let height = (lines.len() as u16 + 2).min(area.height);
    let place =
        Rect { x: area.x + (area.width - width) / 2, y: area.y + (area.height - height) / 2, width, height };
    frame.render_widget(Clear, place);
    let text: Vec<Line<'_>> = lines.iter().map(|line| Line::from(format!(" {line}"))).collect();
    frame.render_widget(Paragraph::new(text).block(Block::bordered().title(" Keys and words ")), place);
}

#[cfg(test)]
mod tests {
    use super::super::board::Wish;
    use super::super::board::tests::example;
    use super::*;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    fn shown(board: &Board, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, board)).unwrap();
        terminal.backend().to_string()
    }

    #[test]
    fn a_usual_screen_has_all_tables() {
        let mut board = Board::default();
        board.update(example());
        let screen = shown(&board, 120, 30);
        for words in [
            "Desk · coordinator studio",
            "Nodes",
            "Models",
            "Jobs",
            "poet",
            "30 of 200",
            "13 min",
            "Stages",
            "qwen",
            "mini",
            "9..36",
            "12.00 ms",
            "90 %",
        ] {
            assert!(screen.contains(words), "no {words} in\n{screen}");
        }
    }

    #[test]
    fn every_size_can_be_drawn_and_a_small_one_shows_the_table_with_the_focus() {
        let mut board = Board::default();
        board.update(example());
        board.wish(Wish::PreviousPane);
        for (width, height) in [(1, 1), (2, 3), (20, 5), (40, 12), (80, 24), (300, 100)] {
            shown(&board, width, height);
            board.shows_help = true;
            shown(&board, width, height);
            board.shows_help = false;
        }
        let small = shown(&board, 80, 18);
        assert!(small.contains("9..36"), "{small}");
    }

    #[test]
    fn the_head_says_by_what_a_table_is_sorted_and_the_foot_when_there_is_no_news() {
        let mut board = Board::default();
        board.update(example());
        for _ in 0..3 {
            board.wish(Wish::Sort);
        }
        assert!(shown(&board, 120, 30).contains("memory ▼"), "{}", shown(&board, 120, 30));
        board.follow.lost = Some("the node ended".into());
        assert!(shown(&board, 120, 30).contains("no news: the node ended"));
        board.update(super::super::Follow::default());
        assert!(shown(&board, 120, 30).contains("no model is loaded"));
    }
}
