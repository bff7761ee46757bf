"""Plain tensor functions, one file an operation. Each public function picks an implementation by device and dtype."""
