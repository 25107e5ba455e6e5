//! Mount processes that are killed or stopped: their holder starts another, and applications see a pause.

mod chaos;
mod ends;
mod grown;
mod live;
mod load;
mod read;
mod table;
mod upgrade;
mod write;
