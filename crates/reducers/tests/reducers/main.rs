//! Methods, schedules, scores and costs, in one binary: each further one that instantiates a backend costs as
//! much to build.

mod cost;
mod encoder_methods;
mod files;
mod nuwa;
mod properties;
mod rules;
mod schedules;
mod scores;
