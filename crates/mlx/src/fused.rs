//! Chains of element-wise operations as one kernel.
//!
//! MLX can compile a function of arrays: element-wise operations in it become one kernel, which saves a GPU the writing and reading
//! of what lies between them, and the host an operation each. On the CPU backend a compiler would have to run first, so there
//! the operations stay as they are unless [`Device::set_fusing`] asks for it.

use crate::error::{check, last};
use crate::{Array, Device, Error, Result, counts};
use mlx_sys as sys;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::rc::Rc;

/// A function of arrays that depends on nothing else, so that tracing it once is enough.
pub type Chain = fn(&Device, &[&Array]) -> Result<Array>;

/// What a [`Function`] does.
pub(crate) type Body = Box<dyn Fn(&Device, &[&Array]) -> Result<Vec<Array>>>;

thread_local! {
    /// Why the body that was traced last did not come to an end. MLX passes on only that it did not.
    static FAILURE: RefCell<Option<Error>> = const { RefCell::new(None) };
}

/// The reason of the body of a call that failed, if it had one.
pub(crate) fn failure_of_body() -> Option<Error> {
    FAILURE.take()
}

/// Before a call: what an earlier one left is not its reason.
pub(crate) fn forget_failure() {
    FAILURE.set(None);
}

/// The chains that a device has compiled.
#[derive(Default)]
pub(crate) struct FusedChains {
    /// Set when somebody asked; else what the device is decides.
    asked: Cell<Option<bool>>,
    /// Is a body being traced?
    tracing: Cell<bool>,
    compiled: RefCell<HashMap<usize, Rc<Function>>>,
}

/// A function of arrays that MLX has compiled. It belongs to the thread that made it.
pub struct Function(sys::mlx_closure);

impl Drop for Function {
    fn drop(&mut self) {
        // SAFETY: made by `compile` and freed once.
        unsafe { sys::mlx_closure_free(self.0) };
    }
}

impl std::fmt::Debug for Function {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Function")
    }
}

impl Function {
    /// Compiles `body`, which must depend on nothing but its inputs and what never changes. It is traced again for element types and
    /// shapes that it has not seen, and what was made for each is kept.
    ///
    /// # Errors
    ///
    /// MLX's.
    pub fn new(body: impl Fn(&Device, &[&Array]) -> Result<Vec<Array>> + 'static) -> Result<Self> {
        Self::compile(Box::new(body), false)
    }

    /// Takes a closure over.
    pub(crate) fn own(native: sys::mlx_closure) -> Self {
        Self(native)
    }

    pub(crate) fn native(&self) -> sys::mlx_closure {
        self.0
    }

    /// What the function makes of `inputs`; one operation.
    ///
    /// # Errors
    ///
    /// MLX's, and those of the body while it is traced.
    pub fn apply(&self, inputs: &[&Array]) -> Result<Vec<Array>> {
        counts::operation();
        forget_failure();
        let handles: Vec<sys::mlx_array> = inputs.iter().map(|input| input.handle()).collect();
        // SAFETY: valid handles; the vectors are made and freed here.
        unsafe {
            let given = sys::mlx_vector_array_new_data(handles.as_ptr(), handles.len());
            let mut made = sys::mlx_vector_array_new();
            let status = sys::mlx_closure_apply(&mut made, self.0, given);
            let results = match status {
                0 => Array::of_vector(made),
                _ => Err(failure_of_body().unwrap_or_else(last)),
            };
            sys::mlx_vector_array_free(made);
            sys::mlx_vector_array_free(given);
            results
        }
    }

    fn compile(body: Body, any_shape: bool) -> Result<Self> {
        let plain = closure(body)?;
        let mut compiled = Self(sys::mlx_closure { ctx: std::ptr::null_mut() });
        // SAFETY: an empty closure is filled; both are freed once.
        check(unsafe { sys::mlx_compile(&mut compiled.0, plain.0, any_shape) })?;
        Ok(compiled)
    }
}

/// `body` as MLX calls it.
pub(crate) fn closure(body: Body) -> Result<Function> {
    let payload = Box::into_raw(Box::new(body)).cast::<c_void>();
    // SAFETY: the closure owns the payload and frees it with `forget_body`.
    let plain = unsafe { sys::mlx_closure_new_func_payload(Some(trace), payload, Some(forget_body)) };
    if plain.ctx.is_null() { Err(last()) } else { Ok(Function(plain)) }
}

impl Device {
    /// Is the body of a [`Function`] or of a [`crate::Gradient`] being traced? Then nothing can be evaluated, and what has no gradient must
    /// not be used.
    #[inline]
    pub fn is_tracing(&self) -> bool {
        self.chains().tracing.get()
    }

    /// Returns what it was.
    fn set_tracing(&self, tracing: bool) -> bool {
        self.chains().tracing.replace(tracing)
    }

    /// Runs `chain` on `inputs`, as one kernel when the device fuses. Element types and shapes of the inputs may differ from call to call.
    #[inline]
    pub fn fused(&self, chain: Chain, inputs: &[&Array]) -> Result<Array> {
        if self.fuses() { self.apply_compiled(chain, inputs) } else { chain(self, inputs) }
    }

    /// Does [`Device::fused`] make one kernel of a chain? A GPU does.
    #[inline]
    pub fn fuses(&self) -> bool {
        self.chains().asked.get().unwrap_or(self.is_gpu())
    }

    /// Has chains fused, or not, whatever the device is. On the CPU backend that needs a C++ compiler when a chain is first used.
    pub fn set_fusing(&self, fuse: bool) {
        self.chains().asked.set(Some(fuse));
    }

    fn apply_compiled(&self, chain: Chain, inputs: &[&Array]) -> Result<Array> {
        let mut compiled = self.chains().compiled.borrow_mut();
        let function = match compiled.get(&(chain as usize)) {
            Some(known) => known.clone(),
            None => {
                let body = move |device: &Device, inputs: &[&Array]| Ok(vec![chain(device, inputs)?]);
                let function = Rc::new(Function::compile(Box::new(body), true)?);
                compiled.insert(chain as usize, function.clone());
                function
            }
        };
        // A chain may itself call `fused` while it is traced.
        drop(compiled);
        function.apply(inputs)?.pop().ok_or_else(|| Error::Mlx("a chain made nothing".to_owned()))
    }
}

/// Called by MLX when a function is not needed any more.
unsafe extern "C" fn forget_body(body: *mut c_void) {
    // SAFETY: `compile` made this box, and MLX frees it once.
    drop(unsafe { Box::from_raw(body.cast::<Body>()) });
}

/// Called by MLX to trace a function: on the thread that applies it, which is the device's.
unsafe extern "C" fn trace(
    result: *mut sys::mlx_vector_array,
    inputs: sys::mlx_vector_array,
    body: *mut c_void,
) -> c_int {
    // SAFETY: `compile` gave this address, and it lives as long as the closure that is called.
    let body: &Body = unsafe { &*body.cast::<Body>() };
    let traced = || -> Result<Vec<Array>> {
        let device = Device::open()?;
        // SAFETY: MLX gives a valid vector.
        let inputs = unsafe { Array::of_vector(inputs) }?;
        let before = device.counts();
        let outer = device.set_tracing(true);
        let made = body(&device, &inputs.iter().collect::<Vec<_>>());
        device.set_tracing(outer);
        counts::forget_since(before); // tracing is not running
        made
    };
    match traced() {
        Ok(arrays) => {
            let handles: Vec<sys::mlx_array> = arrays.iter().map(Array::handle).collect();
            // SAFETY: MLX gives a place for the result; the arrays are alive during the call.
            unsafe { sys::mlx_vector_array_set_data(result, handles.as_ptr(), handles.len()) }
        }
        Err(error) => {
            FAILURE.with_borrow_mut(|failure| {
                failure.get_or_insert(error);
            });
            1
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Dtype;

    fn swish(device: &Device, inputs: &[&Array]) -> Result<Array> {
        let [gate, up] = inputs else { return Err(crate::Error::Mlx("two inputs".to_owned())) };
        device.multiply(&device.multiply(gate, &device.sigmoid(gate)?)?, up)
    }

    fn refused(device: &Device, inputs: &[&Array]) -> Result<Array> {
        device.matmul(inputs[0], inputs[0])
    }

    #[test]
    fn a_chain_is_one_operation_with_the_same_result_for_any_shape_and_type() {
        let device = Device::open().unwrap();
        device.set_fusing(true);
        for (shape, dtype) in [([2, 3], Dtype::F32), ([1, 6], Dtype::F32), ([3, 2], Dtype::BF16)] {
            let values = |seed: f32| (0..6).map(|i| (i as f32 + seed).sin()).collect::<Vec<_>>();
            let array = |seed| device.cast(&Array::from_f32(&values(seed), &shape).unwrap(), dtype).unwrap();
            let (gate, up) = (array(0.3), array(4.0));
            let before = device.counts();
            let fused = device.fused(swish, &[&gate, &up]).unwrap();
            assert_eq!((device.counts() - before).operations, 1);
            let plain = swish(&device, &[&gate, &up]).unwrap();
            assert_eq!((fused.shape(), fused.dtype()), (plain.shape(), plain.dtype()));
            for (fused, plain) in fused.to_f32().unwrap().iter().zip(plain.to_f32().unwrap()) {
                assert!((fused - plain).abs() <= 0.01 * plain.abs(), "{fused} {plain}");
            }
        }
        device.set_fusing(false);
        assert!(!device.fuses());
    }

    #[test]
    fn a_function_may_capture_values_and_make_several_arrays() {
        let device = Device::open().unwrap();
        let kept = 2;
        let function = Function::new(move |device, inputs| {
            let [x] = inputs else { return Err(crate::Error::Mlx("one input".to_owned())) };
            let order = device.argsort(x, -1)?;
            let order = device.slice(&order, &[0, 0], &[x.dim(0), kept])?;
            Ok(vec![device.take_along(x, &order, -1)?, order])
        })
        .unwrap();
        for rows in [1, 3, 1] {
            let values: Vec<f32> = (0..rows * 4).map(|index| -(index as f32)).collect();
            let x = Array::from_f32(&values, &[rows, 4]).unwrap();
            let before = device.counts();
            let made = function.apply(&[&x]).unwrap();
            assert_eq!((device.counts() - before).operations, 1);
            let [least, order] = made.as_slice() else { panic!("two arrays") };
            assert_eq!(least.shape(), [rows, kept]);
            assert_eq!(device.contiguous(order).unwrap().to_u32().unwrap()[..2], [3, 2]);
            assert_eq!(device.contiguous(least).unwrap().to_f32().unwrap()[..2], [-3.0, -2.0]);
        }
    }

    #[test]
    fn a_chain_that_is_refused_is_an_error() {
        let device = Device::open().unwrap();
        device.set_fusing(true);
        let x = Array::from_f32(&[1.0; 6], &[2, 3]).unwrap();
        assert!(device.fused(refused, &[&x]).is_err());
        device.set_fusing(false);
    }
}
