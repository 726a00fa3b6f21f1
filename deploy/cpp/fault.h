// What a user can mend: its text is the one line that the program ends with.
#pragma once

#include <stdexcept>
#include <string>

namespace dcn {

struct Fault : std::runtime_error {
    using std::runtime_error::runtime_error;
};

}  // namespace dcn
