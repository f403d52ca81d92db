# Compiles through ccache when there is one.
find_program(SCATTERMOE_CCACHE ccache)
if(SCATTERMOE_CCACHE)
    # ccache only caches files that use a precompiled header when told that its defines and times may be taken on trust.
    # Not `cmake -E env`: the path of an isolated build's cmake is a new one each time, and new commands mean a new build.
    find_program(SCATTERMOE_ENV env REQUIRED)
    set(_ccache "${SCATTERMOE_ENV}" CCACHE_SLOPPINESS=pch_defines,time_macros,include_file_mtime,include_file_ctime "${SCATTERMOE_CCACHE}")
    foreach(_language CXX CUDA)
        if(NOT DEFINED CMAKE_${_language}_COMPILER_LAUNCHER)
            set(CMAKE_${_language}_COMPILER_LAUNCHER ${_ccache})
        endif()
    endforeach()
endif()
