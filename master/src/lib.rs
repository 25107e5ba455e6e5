//! efc-master
