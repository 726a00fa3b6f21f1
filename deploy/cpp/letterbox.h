// How a picture comes into the network's frame, as utils/augmentations.py does it: scaled with its proportions kept,
// grey margins around it.
#pragma once

#include <utility>

#include "picture.h"

namespace dcn {

struct Letterbox {
    int height = 0, width = 0;           // of the picture
    int scaled_height = 0, scaled_width = 0;
    int top = 0, bottom = 0, left = 0, right = 0;  // margins, pixels
    double gain = 1.0;                   // network pixels a pixel of the picture
    double pad_x = 0.0, pad_y = 0.0;     // half of what was left over, before rounding: boxes are moved back by it
};

// Where a picture of height x width goes. `automatic`: margins only up to the next multiple of `stride`, so that the
// frame may be smaller than frame_height x frame_width.
Letterbox fit(int height, int width, int frame_height, int frame_width, bool automatic, int stride);

// {height, width} of the frame that a Letterbox fills.
std::pair<int, int> frame_of(const Letterbox& box);

// Writes the framed picture as floats 0..1, planes R, G, B of the frame's size.
void letterbox(const Picture& picture, const Letterbox& box, float* planes);

// Bilinear, on OpenCV's grid and in its fixed point: the same bytes as cv2.resize(..., INTER_LINEAR).
Picture resize(const Picture& picture, int height, int width);

}  // namespace dcn
