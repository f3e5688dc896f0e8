use std::slice::from_mut;

use burn::tensor::backend::Backend;

use crate::{Linear, Vocabulary, Weight};

/// A module whose linear maps can be reached. Burn's mappers reach tensors; this reaches the maps
/// themselves, to give them adapters, and their weights, to keep them in codes. [`linears!`](crate::linears)
/// writes it.
pub trait Linears<B: Backend> {
    /// Appends every linear map, with its path below `path`.
    fn linears<'a>(&'a mut self, path: &str, found: &mut Vec<(String, &'a mut Linear<B>)>);

    /// Appends the weight of every linear map, and the blocks of every vocabulary table, with the path of the
    /// parameter that it is.
    fn weights<'a>(&'a mut self, path: &str, found: &mut Vec<(String, &'a mut [Weight<B>])>);
}

impl<B: Backend> Linears<B> for Linear<B> {
    fn linears<'a>(&'a mut self, path: &str, found: &mut Vec<(String, &'a mut Linear<B>)>) {
        found.push((path.to_owned(), self));
    }

    fn weights<'a>(&'a mut self, path: &str, found: &mut Vec<(String, &'a mut [Weight<B>])>) {
        found.push((below(path, "weight"), from_mut(&mut self.weight)));
    }
}

impl<B: Backend> Linears<B> for Vocabulary<B> {
    fn linears<'a>(&'a mut self, _: &str, _: &mut Vec<(String, &'a mut Linear<B>)>) {}

    fn weights<'a>(&'a mut self, path: &str, found: &mut Vec<(String, &'a mut [Weight<B>])>) {
        found.push((below(path, "weight"), &mut self.weight));
    }
}

impl<B: Backend, M: Linears<B>> Linears<B> for Option<M> {
    fn linears<'a>(&'a mut self, path: &str, found: &mut Vec<(String, &'a mut Linear<B>)>) {
        if let Some(module) = self {
            module.linears(path, found);
        }
    }

    fn weights<'a>(&'a mut self, path: &str, found: &mut Vec<(String, &'a mut [Weight<B>])>) {
        if let Some(module) = self {
            module.weights(path, found);
        }
    }
}

impl<B: Backend, M: Linears<B>> Linears<B> for Vec<M> {
    fn linears<'a>(&'a mut self, path: &str, found: &mut Vec<(String, &'a mut Linear<B>)>) {
        for (index, module) in self.iter_mut().enumerate() {
            module.linears(&below(path, &index.to_string()), found);
        }
    }

    fn weights<'a>(&'a mut self, path: &str, found: &mut Vec<(String, &'a mut [Weight<B>])>) {
        for (index, module) in self.iter_mut().enumerate() {
            module.weights(&below(path, &index.to_string()), found);
        }
    }
}

/// The path of a field.
#[doc(hidden)]
pub fn below(path: &str, field: &str) -> String {
    match path.is_empty() {
        true => field.to_owned(),
        false => format!("{path}.{field}"),
    }
}

/// Implements [`Linears`] for a module: all its fields in which there are linear maps or vocabulary tables.
///
/// ```
/// use burn::module::Module;
/// use burn::tensor::backend::Backend;
/// use reroute_layers::{Linear, linears};
///
/// #[derive(Module, Debug)]
/// struct Mlp<B: Backend> {
///     fc1: Linear<B>,
///     fc2: Linear<B>,
/// }
///
/// linears!(Mlp: fc1, fc2);
/// ```
#[macro_export]
macro_rules! linears {
    ($module:ident: $($field:ident),+) => {
        impl<B: ::burn::tensor::backend::Backend> $crate::Linears<B> for $module<B> {
            fn linears<'a>(
                &'a mut self,
                path: &str,
                found: &mut Vec<(String, &'a mut $crate::Linear<B>)>,
            ) {
                $(
                    let path_of_field = $crate::below(path, stringify!($field));
                    $crate::Linears::linears(&mut self.$field, &path_of_field, found);
                )+
            }

            fn weights<'a>(
                &'a mut self,
                path: &str,
                found: &mut Vec<(String, &'a mut [$crate::Weight<B>])>,
            ) {
                $(
                    let path_of_field = $crate::below(path, stringify!($field));
                    $crate::Linears::weights(&mut self.$field, &path_of_field, found);
                )+
            }
        }
    };
}
