// The whole runtime as one object file, linked into every kernel library.
#include "scheduler.cpp"
#include "checks.cpp"
#include "launch.cpp"
