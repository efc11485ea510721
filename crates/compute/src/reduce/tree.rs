//! The tree along which a step's micro-batches are added up.
//!
//! Over `n` leaves, the root is `[0, n)`, and a node of more than one leaf is split behind the largest power of two that is smaller
//! than its length, as in the hash trees of RFC 6962. So whole powers of two are whole subtrees, adding leaves from left to right
//! never needs more than log2(n) sums at a time, and any run of leaves is at most 2 log2(n) subtrees.

use std::collections::BTreeMap;
use std::ops::Range;

/// A subtree: the micro-batches from `start` to before `end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TreeNode {
    /// The first leaf.
    pub start: u32,
    /// One past the last leaf; greater than `start`.
    pub end: u32,
}

impl TreeNode {
    /// The leaf of one micro-batch.
    pub fn leaf(index: u32) -> Self {
        Self { start: index, end: index + 1 }
    }

    fn is_leaf(self) -> bool {
        self.end - self.start == 1
    }

    /// Where the right child begins. Only for nodes that are no leaves.
    fn split(self) -> u32 {
        let length = self.end - self.start;
        self.start + (1 << (31 - (length - 1).leading_zeros()))
    }

    /// The node above `self` in a tree of `leaves`; none above the root, or when `self` is no node of this tree.
    fn parent(self, leaves: u32) -> Option<Self> {
        let mut node = Self { start: 0, end: leaves };
        loop {
            if node == self || node.start >= node.end || node.is_leaf() {
                return None;
            }
            let middle = node.split();
            let (left, right) =
                (Self { start: node.start, end: middle }, Self { start: middle, end: node.end });
            if left == self || right == self {
                return Some(node);
            }
            node = if self.start < middle { left } else { right };
        }
    }

    /// Is it a node of the tree over `leaves`?
    pub fn is_of(self, leaves: u32) -> bool {
        self == Self { start: 0, end: leaves } && leaves > 0 || self.parent(leaves).is_some()
    }
}

/// The fewest whole subtrees that make up `run` in a tree of `leaves`, from left to right. Empty for an empty run.
pub fn nodes_of(run: &Range<u32>, leaves: u32) -> Vec<TreeNode> {
    let mut nodes = Vec::new();
    // From left to right: what is looked at next is on top.
    let mut open = vec![TreeNode { start: 0, end: leaves }];
    while let Some(node) = open.pop() {
        if node.start >= node.end || node.end <= run.start || run.end <= node.start {
            continue;
        }
        if run.start <= node.start && node.end <= run.end {
            nodes.push(node);
            continue;
        }
        let middle = node.split();
        open.push(TreeNode { start: middle, end: node.end });
        open.push(TreeNode { start: node.start, end: middle });
    }
    nodes
}

/// A sum along the tree, whose parts may come in any order: as soon as both halves of a node are there they are added.
#[derive(Clone, Debug)]
pub struct TreeSum<V> {
    leaves: u32,
    /// By where they start. They do not overlap.
    parts: BTreeMap<u32, (TreeNode, V)>,
}

impl<V> TreeSum<V> {
    /// Nothing yet, of `leaves` micro-batches.
    pub fn new(leaves: u32) -> Self {
        Self { leaves, parts: BTreeMap::new() }
    }

    /// Adds a part; `add` gets the left half first. False, and nothing is done, when `node` is none of the tree or overlaps with a part.
    ///
    /// # Errors
    ///
    /// The first error of `add`; both halves are lost then.
    pub fn insert<E>(
        &mut self,
        node: TreeNode,
        value: V,
        mut add: impl FnMut(V, V) -> Result<V, E>,
    ) -> Result<bool, E> {
        if !node.is_of(self.leaves) || self.overlaps(node) {
            return Ok(false);
        }
        let (mut node, mut value) = (node, value);
        while let Some(parent) = node.parent(self.leaves) {
            let other = if parent.start == node.start {
                TreeNode { start: node.end, end: parent.end }
            } else {
                TreeNode { start: parent.start, end: node.start }
            };
            match self.parts.remove(&other.start) {
                Some((found, sibling)) if found == other => {
                    value =
                        if other.start < node.start { add(sibling, value)? } else { add(value, sibling)? };
                    node = parent;
                }
                Some(smaller) => {
                    self.parts.insert(other.start, smaller);
                    break;
                }
                None => break,
            }
        }
        self.parts.insert(node.start, (node, value));
        Ok(true)
    }

    fn overlaps(&self, node: TreeNode) -> bool {
        let before = self.parts.range(..node.end).next_back();
        before.is_some_and(|(_, (part, _))| part.end > node.start)
    }

    /// The sum, when all leaves are in it.
    pub fn whole(&self) -> Option<&V> {
        let (node, value) = self.parts.get(&0)?;
        (node.end == self.leaves).then_some(value)
    }

    /// The parts, from left to right.
    pub fn parts(&self) -> impl Iterator<Item = (TreeNode, &V)> {
        self.parts.values().map(|(node, value)| (*node, value))
    }

    /// The parts, from left to right.
    pub fn into_parts(self) -> impl Iterator<Item = (TreeNode, V)> {
        self.parts.into_values()
    }

    /// Drops parts that do not lie within `run`.
    pub fn keep_within(&mut self, run: &Range<u32>) {
        self.parts.retain(|_, (node, _)| run.start <= node.start && node.end <= run.end);
    }

    /// Is this leaf in it?
    pub fn has(&self, leaf: u32) -> bool {
        self.overlaps(TreeNode::leaf(leaf))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;

    fn node(start: u32, end: u32) -> TreeNode {
        TreeNode { start, end }
    }

    #[test]
    fn runs_are_few_whole_subtrees() {
        type Case = (Range<u32>, u32, &'static [(u32, u32)]);
        let cases: [Case; 8] = [
            (0..8, 8, &[(0, 8)]),
            (0..7, 7, &[(0, 7)]),
            (4..7, 7, &[(4, 7)]),
            (0..3, 8, &[(0, 2), (2, 3)]),
            (3..6, 8, &[(3, 4), (4, 6)]),
            (1..7, 8, &[(1, 2), (2, 4), (4, 6), (6, 7)]),
            (2..2, 8, &[]),
            (0..1, 1, &[(0, 1)]),
        ];
        for (run, leaves, nodes) in cases {
            let expected: Vec<_> = nodes.iter().map(|&(start, end)| node(start, end)).collect();
            assert_eq!(nodes_of(&run, leaves), expected, "{run:?} of {leaves}");
        }
    }

    #[test]
    fn the_order_of_arrival_does_not_show() {
        let bracket = |left: String, right: String| Ok::<_, Infallible>(format!("({left}{right})"));
        for (leaves, expected) in
            [(1, "0"), (3, "((01)2)"), (6, "(((01)(23))(45))"), (7, "(((01)(23))((45)6))")]
        {
            for seed in 0..50_u32 {
                let mut order: Vec<u32> = (0..leaves).collect();
                order.sort_by_key(|leaf| (leaf + 1).wrapping_mul(2_654_435_761).rotate_left(seed));
                let mut sum = TreeSum::new(leaves);
                for leaf in order {
                    assert_eq!(sum.insert(TreeNode::leaf(leaf), leaf.to_string(), bracket), Ok(true));
                }
                assert_eq!(sum.whole().map(String::as_str), Some(expected));
            }
        }
    }

    #[test]
    fn parts_of_runs_make_the_same_sum() {
        let bracket = |left: String, right: String| Ok::<_, Infallible>(format!("({left}{right})"));
        for leaves in 1..20 {
            let mut alone = TreeSum::new(leaves);
            for leaf in 0..leaves {
                assert_eq!(alone.insert(TreeNode::leaf(leaf), leaf.to_string(), bracket), Ok(true));
            }
            for cut in 0..=leaves {
                let mut whole = TreeSum::new(leaves);
                for run in [cut..leaves, 0..cut] {
                    let mut part = TreeSum::new(leaves);
                    for leaf in run.clone() {
                        assert_eq!(part.insert(TreeNode::leaf(leaf), leaf.to_string(), bracket), Ok(true));
                    }
                    let parts: Vec<_> = part.into_parts().collect();
                    assert_eq!(parts.iter().map(|part| part.0).collect::<Vec<_>>(), nodes_of(&run, leaves));
                    for (node, value) in parts {
                        assert_eq!(whole.insert(node, value, bracket), Ok(true));
                    }
                }
                assert_eq!(whole.whole(), alone.whole(), "{leaves} cut at {cut}");
            }
        }
    }

    #[test]
    fn refuses_what_is_no_node_and_what_is_there_already() {
        let add = |left: u32, right: u32| Ok::<_, Infallible>(left + right);
        let mut sum = TreeSum::new(7);
        for wrong in [node(1, 3), node(0, 8), node(5, 5), node(6, 5), node(7, 8), node(0, 3)] {
            assert!(!wrong.is_of(7), "{wrong:?}");
            assert_eq!(sum.insert(wrong, 1, add), Ok(false));
        }
        assert_eq!(sum.insert(node(4, 6), 1, add), Ok(true));
        for again in [node(4, 5), node(4, 6), node(4, 7), node(0, 7)] {
            assert_eq!(sum.insert(again, 1, add), Ok(false), "{again:?}");
        }
        assert!(sum.has(5) && !sum.has(6) && sum.whole().is_none());
        assert!(!node(0, 1).is_of(0));
    }
}
