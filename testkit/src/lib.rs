//! Test servers of our own and starters of real ones. Never linked into a product.
