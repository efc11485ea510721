//! numpy's permutations, so that a run or a measurement takes the rows that mlx-lm takes for the same seed.

use rand_mt::Mt;

/// `numpy.random.seed` and `numpy.random.permutation`: a Mersenne Twister (Matsumoto and Nishimura 1998), and Fisher and Yates'
/// shuffle from the end with places drawn by rejection from as many bits as they need.
pub struct Numpy(Mt);

impl Numpy {
    /// As after `numpy.random.seed(seed)`.
    pub fn new(seed: u32) -> Self {
        Self(Mt::new(seed))
    }

    /// The numbers below `count` in the order of the next `numpy.random.permutation(count)`.
    pub fn permutation(&mut self, count: u32) -> Vec<u32> {
        let mut order: Vec<u32> = (0..count).collect();
        for place in (1..count).rev() {
            let bits = u32::MAX >> place.leading_zeros();
            let other = loop {
                let drawn = self.0.next_u32() & bits;
                if drawn <= place {
                    break drawn;
                }
            };
            order.swap(place as usize, other as usize);
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Printed by numpy 2: one seed, then another and a length that is no power of two.
    #[test]
    fn the_order_is_numpys() {
        assert_eq!(Numpy::new(123).permutation(10), [4, 0, 7, 5, 8, 3, 1, 6, 9, 2]);
        assert_eq!(Numpy::new(0).permutation(5), [2, 0, 1, 3, 4]);
        assert!(Numpy::new(5).permutation(0).is_empty());
        assert_eq!(Numpy::new(5).permutation(1), [0]);
        let mut sorted = Numpy::new(123).permutation(1000);
        sorted.sort_unstable();
        assert!(sorted.into_iter().eq(0..1000));
    }
}
