"""Native CPU kernels: C compiled for this machine, loaded through ctypes. Without a C compiler torch does the work."""
