# Defines scattermoe::openmp. at::parallel_for is an inline template over OpenMP, serial in a file compiled without it; its
# threads must be those of the OpenMP runtime PyTorch itself uses, or every call would wake a second pool of threads.

add_library(scattermoe::openmp INTERFACE IMPORTED)
find_package(OpenMP QUIET COMPONENTS CXX)
if(NOT OpenMP_CXX_FOUND)
    message(NOTICE "scattermoe: ${CMAKE_CXX_COMPILER_ID} has no OpenMP here (clang needs libomp-dev): the CPU kernels will be single-threaded")
elseif(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    target_compile_options(scattermoe::openmp INTERFACE ${OpenMP_CXX_FLAGS})
    # Wheels of PyTorch bring a libgomp of their own, in some releases under a name of its own.
    file(
        GLOB _gomp
        "${SCATTERMOE_TORCH_DIR}/lib/libgomp*.so*"
        "${SCATTERMOE_TORCH_DIR}/../torch.libs/libgomp*.so*"
    )
    if(_gomp)
        list(GET _gomp 0 _gomp)
        add_library(scattermoe::gomp SHARED IMPORTED)
        set_target_properties(scattermoe::gomp PROPERTIES IMPORTED_LOCATION "${_gomp}")
        target_link_libraries(scattermoe::openmp INTERFACE scattermoe::gomp)
    else()
        target_link_options(scattermoe::openmp INTERFACE ${OpenMP_CXX_FLAGS})
    endif()
else()
    target_link_libraries(scattermoe::openmp INTERFACE OpenMP::OpenMP_CXX)
endif()
