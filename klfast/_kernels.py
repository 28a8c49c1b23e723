from klfast._kernels_avx2 import gufuncs
