//! Methods that reduce visual tokens before the decoder: against published code, against plain loops,
//! by hand, and what must hold for all of them.

mod by_hand;
mod properties;
mod released;
mod restated;
mod support;
