//! Who is next: requests of several tenants, each served in its own order, and all of them a fair share of the tokens.
//!
//! Fair is what everybody gets of the machine, not how many requests they bring. Each tenant has a counter of the work done for it, in
//! tokens, and the waiting tenant with the smallest one is next: virtual token counters, by Sheng et al., "Fairness in Serving Large
//! Language Models" (OSDI 2024). A tenant that comes back after a pause begins where those are that were busy meanwhile, so that
//! nobody saves a share up; one that is alone has all of the machine. Between two tenants that always have something waiting, the
//! counters never differ by more than what the largest request adds and what runs already.
//!
//! What was under way before (a sequence that lost its replica, or its memory) comes before all others, the oldest first: somebody sees
//! its tokens stop.

use std::collections::{BTreeMap, VecDeque};

/// What a token of an answer counts, in tokens of prompts: the paper's price, after what they take.
pub(super) const ANSWER_TOKEN: u64 = 2;
/// Tenants without requests whose counters are remembered. Who is forgotten begins where the others are, as after a pause.
const REMEMBERED: usize = 1024;

/// Something that waits.
pub(super) trait Waits {
    /// Whose it is.
    fn tenant(&self) -> &str;
    /// Tokens to be computed before its next token comes.
    fn tokens(&self) -> usize;
}

/// Requests that wait, and the counters of their tenants.
#[derive(Debug)]
pub(super) struct FairQueue<T> {
    /// What was under way before, by age.
    continued: BTreeMap<u64, T>,
    tenants: BTreeMap<String, Tenant<T>>,
    /// Tokens of all that wait, and their number, those of `continued` not counted.
    tokens: usize,
    len: usize,
    /// Tells apart who came first when counters are equal.
    next_turn: u64,
    /// The largest counter of a tenant that was next: where newcomers begin while nobody waits.
    floor: u64,
}

#[derive(Debug)]
struct Tenant<T> {
    /// Work done for it, in tokens of prompts.
    counter: u64,
    waiting: VecDeque<T>,
    tokens: usize,
    /// When it was served last, as a number that grows.
    turn: u64,
}

impl<T> Default for Tenant<T> {
    fn default() -> Self {
        Self { counter: 0, waiting: VecDeque::new(), tokens: 0, turn: 0 }
    }
}

/// A place in the queue, until something changes in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// By age.
    Continued(u64),
    /// By tenant and number.
    Waiting(String, usize),
}

impl<T> Default for FairQueue<T> {
    fn default() -> Self {
        Self {
            continued: BTreeMap::new(),
            tenants: BTreeMap::new(),
            tokens: 0,
            len: 0,
            next_turn: 1,
            floor: 0,
        }
    }
}

impl<T: Waits> FairQueue<T> {
    /// Behind the others of its tenant.
    pub(super) fn push(&mut self, item: T) {
        let is_idle = self.tenants.get(item.tenant()).is_none_or(|tenant| tenant.waiting.is_empty());
        if is_idle {
            let busy = self.tenants.values().filter(|tenant| !tenant.waiting.is_empty());
            let least = busy.map(|tenant| tenant.counter).min().unwrap_or(self.floor);
            let tenant = self.tenants.entry(item.tenant().to_owned()).or_default();
            tenant.counter = tenant.counter.max(least);
        }
        let tokens = item.tokens();
        let Some(tenant) = self.tenants.get_mut(item.tenant()) else { return };
        tenant.waiting.push_back(item);
        tenant.tokens += tokens;
        self.tokens += tokens;
        self.len += 1;
        self.forget();
    }

    /// Before all others that are younger. `age` grows from request to request and is nobody else's.
    pub(super) fn push_continued(&mut self, age: u64, item: T) {
        self.continued.insert(age, item);
    }

    /// Who is next among those for whom `may` says so. Within a tenant nobody is passed but those for whom it does not.
    pub(super) fn next(&mut self, mut may: impl FnMut(&mut T) -> bool) -> Option<Place> {
        for (age, item) in &mut self.continued {
            if may(item) {
                return Some(Place::Continued(*age));
            }
        }
        let mut order: Vec<(u64, u64, &String)> = self
            .tenants
            .iter()
            .filter(|(_, tenant)| !tenant.waiting.is_empty())
            .map(|(name, tenant)| (tenant.counter, tenant.turn, name))
            .collect();
        order.sort_unstable();
        let names: Vec<String> = order.into_iter().map(|(_, _, name)| name.clone()).collect();
        for name in names {
            let Some(tenant) = self.tenants.get_mut(&name) else { continue };
            if let Some(number) = tenant.waiting.iter_mut().position(&mut may) {
                return Some(Place::Waiting(name, number));
            }
        }
        None
    }

    pub(super) fn get(&self, place: &Place) -> Option<&T> {
        match place {
            Place::Continued(age) => self.continued.get(age),
            Place::Waiting(name, number) => self.tenants.get(name)?.waiting.get(*number),
        }
    }

    /// Takes it out. It is served now when `is_served`: that is its tenant's turn.
    pub(super) fn take(&mut self, place: &Place, is_served: bool) -> Option<T> {
        match place {
            Place::Continued(age) => self.continued.remove(age),
            Place::Waiting(name, number) => {
                let tenant = self.tenants.get_mut(name)?;
                let item = tenant.waiting.remove(*number)?;
                tenant.tokens -= item.tokens();
                self.tokens -= item.tokens();
                self.len -= 1;
                if is_served {
                    tenant.turn = self.next_turn;
                    self.next_turn += 1;
                    self.floor = self.floor.max(tenant.counter);
                }
                Some(item)
            }
        }
    }

    /// So much work was done for a tenant, in tokens of prompts.
    pub(super) fn charge(&mut self, tenant: &str, tokens: u64) {
        if let Some(tenant) = self.tenants.get_mut(tenant) {
            tenant.counter = tenant.counter.saturating_add(tokens);
        } else {
            let counter = self.floor.saturating_add(tokens);
            self.tenants.insert(tenant.to_owned(), Tenant { counter, ..Tenant::default() });
            self.forget();
        }
    }

    /// Where the first one is for which `is_it` says so.
    pub(super) fn find(&self, mut is_it: impl FnMut(&T) -> bool) -> Option<Place> {
        if let Some((age, _)) = self.continued.iter().find(|(_, item)| is_it(item)) {
            return Some(Place::Continued(*age));
        }
        self.tenants.iter().find_map(|(name, tenant)| {
            tenant.waiting.iter().position(&mut is_it).map(|number| Place::Waiting(name.clone(), number))
        })
    }

    /// All that wait, those first that were under way.
    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        self.continued.values().chain(self.tenants.values().flat_map(|tenant| &tenant.waiting))
    }

    /// Takes all out.
    pub(super) fn drain(&mut self) -> Vec<T> {
        let continued = std::mem::take(&mut self.continued).into_values();
        let waiting = self.tenants.values_mut().flat_map(|tenant| {
            tenant.tokens = 0;
            std::mem::take(&mut tenant.waiting)
        });
        let all = continued.chain(waiting).collect();
        (self.tokens, self.len) = (0, 0);
        all
    }

    /// How many wait, those included that were under way.
    pub(super) fn len(&self) -> usize {
        self.len + self.continued.len()
    }

    /// How many were under way before.
    pub(super) fn continued(&self) -> usize {
        self.continued.len()
    }

    /// Tokens that newcomers wait behind.
    pub(super) fn tokens(&self) -> usize {
        self.tokens
    }

    /// Requests of a tenant that wait, and their tokens.
    pub(super) fn of(&self, tenant: &str) -> (usize, usize) {
        self.tenants.get(tenant).map_or((0, 0), |tenant| (tenant.waiting.len(), tenant.tokens))
    }

    /// Keeps the memory of tenants bounded: those go first whose counters say least.
    fn forget(&mut self) {
        if self.tenants.len() <= 2 * REMEMBERED {
            return;
        }
        let floor = self.floor;
        self.tenants.retain(|_, tenant| !tenant.waiting.is_empty() || tenant.counter > floor);
        let mut idle: Vec<(u64, String)> = self
            .tenants
            .iter()
            .filter(|(_, tenant)| tenant.waiting.is_empty())
            .map(|(name, tenant)| (tenant.counter, name.clone()))
            .collect();
        idle.sort_unstable();
        let excess = idle.len().saturating_sub(REMEMBERED);
        for (_, name) in &idle[..excess] {
            self.tenants.remove(name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Clone, Debug, PartialEq)]
    struct Item {
        tenant: String,
        number: usize,
        tokens: usize,
    }

    impl Waits for Item {
        fn tenant(&self) -> &str {
            &self.tenant
        }

        fn tokens(&self) -> usize {
            self.tokens
        }
    }

    fn item(tenant: &str, number: usize, tokens: usize) -> Item {
        Item { tenant: tenant.into(), number, tokens }
    }

    /// Takes who is next and does its work at once.
    fn serve(queue: &mut FairQueue<Item>) -> Option<Item> {
        let place = queue.next(|_| true)?;
        let item = queue.take(&place, true)?;
        queue.charge(&item.tenant, item.tokens as u64);
        Some(item)
    }

    #[test]
    fn a_tenant_with_many_requests_gets_no_more_than_one_with_few() {
        let mut queue = FairQueue::default();
        for number in 0..90 {
            queue.push(item("many", number, 10));
        }
        for number in 0..10 {
            queue.push(item("few", number, 10));
        }
        let first: Vec<String> = (0..20).map(|_| serve(&mut queue).unwrap().tenant).collect();
        assert_eq!(first.iter().filter(|tenant| *tenant == "few").count(), 10, "{first:?}");
        // By tokens, not by requests: one of 100 tokens is worth ten of 10.
        let mut queue = FairQueue::default();
        for number in 0..50 {
            queue.push(item("long", number, 100));
            queue.push(item("short", number, 10));
        }
        let first: Vec<Item> = (0..33).map(|_| serve(&mut queue).unwrap()).collect();
        let of = |name: &str| first.iter().filter(|item| item.tenant == name).count();
        assert!(of("short") >= 29 && of("long") >= 3, "{} short, {} long", of("short"), of("long"));
    }

    #[test]
    fn nobody_saves_a_share_up_while_away() {
        let mut queue = FairQueue::default();
        queue.push(item("idle", 0, 1));
        assert_eq!(serve(&mut queue).unwrap().tenant, "idle");
        for number in 0..200 {
            queue.push(item("busy", number, 10));
        }
        for _ in 0..100 {
            serve(&mut queue);
        }
        for number in 0..50 {
            queue.push(item("idle", number, 10));
        }
        let next: Vec<String> = (0..20).map(|_| serve(&mut queue).unwrap().tenant).collect();
        assert_eq!(next.iter().filter(|tenant| *tenant == "idle").count(), 10, "{next:?}");
    }

    #[test]
    fn what_was_under_way_is_first_and_who_may_not_is_passed() {
        let mut queue = FairQueue::default();
        queue.push(item("a", 0, 1));
        queue.push(item("a", 1, 1));
        queue.push_continued(8, item("b", 8, 1));
        queue.push_continued(3, item("c", 3, 1));
        assert_eq!((queue.len(), queue.continued(), queue.tokens(), queue.of("a")), (4, 2, 2, (2, 2)));
        assert_eq!(queue.next(|_| true), Some(Place::Continued(3)));
        assert_eq!(queue.next(|item| item.number != 3), Some(Place::Continued(8)));
        assert_eq!(queue.next(|item| item.number == 1), Some(Place::Waiting("a".into(), 1)));
        let place = queue.find(|item| item.number == 1).unwrap();
        assert_eq!(queue.get(&place).map(|item| item.number), Some(1));
        assert_eq!(queue.take(&place, false).map(|item| item.number), Some(1));
        assert_eq!(queue.drain().len(), 3);
        assert_eq!((queue.len(), queue.tokens(), queue.of("a")), (0, 0, (0, 0)));
    }

    #[test]
    fn the_memory_of_tenants_is_bounded() {
        let mut queue = FairQueue::default();
        for number in 0..10_000 {
            let tenant = format!("tenant{number}");
            queue.push(item(&tenant, number, 5));
            serve(&mut queue);
            queue.charge(&tenant, 1_000_000);
            queue.charge(&format!("gone{number}"), 3);
        }
        assert!(queue.tenants.len() <= 2 * REMEMBERED + 1, "{}", queue.tenants.len());
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

        /// The bound of the paper, for a machine that does one request after the other: while two tenants both have something waiting, what they got
        /// does not differ by more than twice the largest request.
        #[test]
        fn shares_of_the_waiting_differ_by_no_more_than_two_requests(
            arrivals in proptest::collection::vec((0usize..4, 1usize..200, 0usize..4), 1..200),
        ) {
            const LARGEST: u64 = 200;
            let names = ["a", "b", "c", "d"];
            let mut queue = FairQueue::default();
            let mut got = [0u64; 4];
            // What each pair had when both began to wait together.
            let mut since: BTreeMap<(usize, usize), (u64, u64)> = BTreeMap::new();
            let mut order: BTreeMap<String, Vec<usize>> = BTreeMap::new();
            let mut served = 0;
            let mut check = |queue: &FairQueue<Item>, got: &[u64; 4]| -> Result<(), TestCaseError> {
                for left in 0..4 {
                    for right in left + 1..4 {
                        let waits = |tenant: usize| queue.of(names[tenant]).0 > 0;
                        if !waits(left) || !waits(right) {
                            since.remove(&(left, right));
                            continue;
                        }
                        let (from_left, from_right) = *since.entry((left, right)).or_insert((got[left], got[right]));
                        let difference = (got[left] - from_left).abs_diff(got[right] - from_right);
                        prop_assert!(difference <= 2 * LARGEST, "{} against {}: {}", names[left], names[right], difference);
                    }
                }
                Ok(())
            };
            for (number, (tenant, tokens, steps)) in arrivals.iter().enumerate() {
                queue.push(item(names[*tenant], number, *tokens));
                check(&queue, &got)?;
                for _ in 0..*steps {
                    if let Some(item) = serve(&mut queue) {
                        let tenant = names.iter().position(|name| *name == item.tenant).unwrap();
                        got[tenant] += item.tokens as u64;
                        order.entry(item.tenant).or_default().push(item.number);
                        served += 1;
                    }
                    check(&queue, &got)?;
                }
            }
            while let Some(item) = serve(&mut queue) {
                order.entry(item.tenant).or_default().push(item.number);
                served += 1;
            }
            prop_assert_eq!(served, arrivals.len(), "nobody is forgotten");
            for numbers in order.values() {
                prop_assert!(numbers.is_sorted(), "first come, first served within a tenant");
            }
        }
    }
}
