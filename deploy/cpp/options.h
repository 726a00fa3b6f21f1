// The command line of both programs: -d MODEL FOLDER and flags of detect.py, by the same names and defaults.
#pragma once

#include <string>

#include "detections.h"

namespace dcn {

struct Options {
    std::string model, source;  // source: a folder of pictures, or one picture
    std::string project = "runs/detect", name = "exp", device, plugin;
    int frame_height = 640, frame_width = 640;  // of files that take any size
    int batch = 1;                              // pictures at once, where the file takes several
    int line_width = 0;                         // 0 follows the size of the picture
    Thresholds limits;
    bool exist_ok = false, save_pictures = true, save_text = false, save_confidence = false;
    bool draw_labels = true, draw_confidence = true, help = false;
};

// Throws Fault that names the flag.
Options parse_options(int count, char** words);

// What --help shows.
std::string usage(const std::string& program, const std::string& model);

}  // namespace dcn
