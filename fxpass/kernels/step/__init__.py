"""One C++ function for what runs between kernels: it calls them too, and plans the memory of all of it."""
