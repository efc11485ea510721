//! Gradients of functions of arrays, and functions whose inner results are computed again rather than kept.

use crate::error::{check, last};
use crate::fused::{Body, closure, failure_of_body, forget_failure};
use crate::{Array, Device, Function, Result, counts};
use mlx_sys as sys;
use std::borrow::Cow;
use std::ffi::c_int;

/// The value of a function of arrays and its gradient with respect to the first of them. It belongs to the thread that made it.
pub struct Gradient {
    native: sys::mlx_closure_value_and_grad,
}

impl Drop for Gradient {
    fn drop(&mut self) {
        // SAFETY: made by `new` and freed once.
        unsafe { sys::mlx_closure_value_and_grad_free(self.native) };
    }
}

impl std::fmt::Debug for Gradient {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Gradient")
    }
}

impl Gradient {
    /// Of `body`, whose first result is a number without dimensions, with respect to its first `inputs` inputs, one at least.
    ///
    /// # Errors
    ///
    /// MLX's.
    pub fn new(
        inputs: usize,
        body: impl Fn(&Device, &[&Array]) -> Result<Vec<Array>> + 'static,
    ) -> Result<Self> {
        crate::error::install_handler();
        let body: Body = Box::new(body);
        let plain = closure(body)?;
        let arguments: Vec<c_int> = (0..c_int::try_from(inputs).unwrap_or(c_int::MAX)).collect();
        // SAFETY: an empty handle is filled; the closure lives during the call, and MLX keeps what it needs of it.
        unsafe {
            let mut native = sys::mlx_closure_value_and_grad_new();
            let status =
                sys::mlx_value_and_grad(&mut native, plain.native(), arguments.as_ptr(), arguments.len());
            let made = Self { native };
            check(status).map(|()| made)
        }
    }

    /// The function's results, and the gradient of the first of them: an array for each input that is differentiated.
    ///
    /// # Errors
    ///
    /// The body's, and MLX's.
    pub fn apply(&self, inputs: &[&Array]) -> Result<(Vec<Array>, Vec<Array>)> {
        counts::operation();
        forget_failure();
        let handles: Vec<sys::mlx_array> = inputs.iter().map(|input| input.handle()).collect();
        // SAFETY: valid handles; the vectors are made and freed here.
        unsafe {
            let given = sys::mlx_vector_array_new_data(handles.as_ptr(), handles.len());
            let mut values = sys::mlx_vector_array_new();
            let mut gradients = sys::mlx_vector_array_new();
            let status =
                sys::mlx_closure_value_and_grad_apply(&mut values, &mut gradients, self.native, given);
            let results = match status {
                0 => Array::of_vector(values)
                    .and_then(|values| Array::of_vector(gradients).map(|gradients| (values, gradients))),
                _ => Err(failure_of_body().unwrap_or_else(last)),
            };
            sys::mlx_vector_array_free(values);
            sys::mlx_vector_array_free(gradients);
            sys::mlx_vector_array_free(given);
            results
        }
    }
}

impl Function {
    /// `body`, not compiled, whose inner results are not kept for its gradient: they are computed again when it is needed. All that
    /// the gradient is taken with respect to must be among the inputs.
    ///
    /// # Errors
    ///
    /// MLX's.
    pub fn checkpointed(body: impl Fn(&Device, &[&Array]) -> Result<Vec<Array>> + 'static) -> Result<Self> {
        crate::error::install_handler();
        let plain = closure(Box::new(body))?;
        // SAFETY: an empty handle is filled and owned by the result.
        unsafe {
            let mut native = sys::mlx_closure_new();
            let status = sys::mlx_checkpoint(&mut native, plain.native());
            let made = Self::own(native);
            check(status).map(|()| made)
        }
    }
}

impl Device {
    /// The products of the Jacobian of `body` at `inputs` with `cotangents`, one for each result of it: the results, and for each
    /// input what a function of the results with these gradients has as its gradient.
    ///
    /// # Errors
    ///
    /// The body's, and MLX's.
    pub fn pull_back(
        &self,
        body: impl Fn(&Device, &[&Array]) -> Result<Vec<Array>> + 'static,
        inputs: &[&Array],
        cotangents: &[&Array],
    ) -> Result<(Vec<Array>, Vec<Array>)> {
        counts::operation();
        forget_failure();
        let plain = closure(Box::new(body))?;
        let handles = |arrays: &[&Array]| arrays.iter().map(|array| array.handle()).collect::<Vec<_>>();
        let (given, wanted) = (handles(inputs), handles(cotangents));
        // SAFETY: valid handles; the vectors are made and freed here.
        unsafe {
            let given = sys::mlx_vector_array_new_data(given.as_ptr(), given.len());
            let wanted = sys::mlx_vector_array_new_data(wanted.as_ptr(), wanted.len());
            let mut values = sys::mlx_vector_array_new();
            let mut gradients = sys::mlx_vector_array_new();
            let status = sys::mlx_vjp(&mut values, &mut gradients, plain.native(), given, wanted);
            let results = match status {
                0 => Array::of_vector(values)
                    .and_then(|values| Array::of_vector(gradients).map(|gradients| (values, gradients))),
                _ => Err(failure_of_body().unwrap_or_else(last)),
            };
            for vector in [given, wanted, values, gradients] {
                sys::mlx_vector_array_free(vector);
            }
            results
        }
    }

    /// Indices in a function that may be differentiated: which entries are taken is no smooth function of anything, and MLX refuses to
    /// differentiate by them.
    #[inline]
    pub(crate) fn as_indices<'a>(&self, indices: &'a Array) -> Result<Cow<'a, Array>> {
        match self.is_tracing() {
            true => self.stop_gradient(indices).map(Cow::Owned),
            false => Ok(Cow::Borrowed(indices)),
        }
    }

    /// The same numbers, through which no gradient flows.
    pub fn stop_gradient(&self, a: &Array) -> Result<Array> {
        // SAFETY: a valid handle; the result is written to an empty handle.
        self.run(|result, stream| unsafe { sys::mlx_stop_gradient(result, a.handle(), stream) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Dtype, Error};
    use std::rc::Rc;

    fn cube_sum(device: &Device, inputs: &[&Array]) -> Result<Vec<Array>> {
        let [x, weights] = inputs else { return Err(Error::Mlx("two inputs".to_owned())) };
        let cubes = device.multiply(&device.multiply(x, x)?, x)?;
        Ok(vec![device.sum(&device.multiply(&cubes, weights)?, 0, false)?, cubes])
    }

    #[test]
    fn the_gradient_of_a_cube_is_three_squares_also_when_compiled_and_checkpointed() {
        let _device = Device::open().unwrap();
        let x = Array::from_f32(&[1.0, -2.0, 3.0], &[3]).unwrap();
        let weights = Array::from_f32(&[1.0, 1.0, 0.5], &[3]).unwrap();
        let expected = [3.0, 12.0, 13.5];
        let plain = Rc::new(Gradient::new(1, cube_sum).unwrap());
        let (values, gradients) = plain.apply(&[&x, &weights]).unwrap();
        assert_eq!(values[0].to_f32().unwrap(), [1.0 - 8.0 + 13.5]);
        assert_eq!(values[1].to_f32().unwrap(), [1.0, -8.0, 27.0]);
        assert_eq!(gradients.len(), 1);
        assert_eq!(gradients[0].to_f32().unwrap(), expected);
        let checkpointed = Function::checkpointed(cube_sum).unwrap();
        let through = Gradient::new(1, move |_, inputs| checkpointed.apply(inputs)).unwrap();
        assert_eq!(through.apply(&[&x, &weights]).unwrap().1[0].to_f32().unwrap(), expected);
        let compiled = Function::new(move |_, inputs| Ok(plain.apply(inputs)?.1)).unwrap();
        for _ in 0..2 {
            assert_eq!(compiled.apply(&[&x, &weights]).unwrap()[0].to_f32().unwrap(), expected);
        }
    }

    #[test]
    fn no_gradient_flows_through_what_is_stopped() {
        let device = Device::open().unwrap();
        let x = Array::from_f32(&[2.0], &[1]).unwrap();
        let gradient = Gradient::new(1, |device, inputs| {
            let stopped = device.stop_gradient(inputs[0])?;
            Ok(vec![device.sum(&device.multiply(inputs[0], &stopped)?, 0, false)?])
        });
        assert_eq!(gradient.unwrap().apply(&[&x]).unwrap().1[0].to_f32().unwrap(), [2.0]);
        let cotangent = Array::from_f32(&[10.0], &[1]).unwrap();
        let square = |device: &Device, inputs: &[&Array]| Ok(vec![device.multiply(inputs[0], inputs[0])?]);
        let (values, gradients) = device.pull_back(square, &[&x], &[&cotangent]).unwrap();
        assert_eq!((values[0].to_f32().unwrap(), gradients[0].to_f32().unwrap()), (vec![4.0], vec![40.0]));
    }

    #[test]
    fn an_error_of_the_body_comes_back() {
        let _device = Device::open().unwrap();
        let x = Array::scalar(1.0, Dtype::F32).unwrap();
        let gradient = Gradient::new(1, |_, _| Err(Error::Mlx("the body's reason".to_owned()))).unwrap();
        let error = gradient.apply(&[&x]).unwrap_err();
        assert_eq!(error, Error::Mlx("the body's reason".to_owned()));
        let refused = Gradient::new(1, |device, inputs| Ok(vec![device.transpose(inputs[0], &[0, 1])?]));
        assert!(refused.unwrap().apply(&[&x]).unwrap_err().to_string().contains("transpose"));
    }
}
