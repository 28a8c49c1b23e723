from klfast._kernels import gufuncs
