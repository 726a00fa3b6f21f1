// From predictions to boxes on the picture, by the rules of utils/nms.py.
#pragma once

#include <cstdint>
#include <vector>

#include "letterbox.h"

namespace dcn {

struct Detection {
    float x1, y1, x2, y2;  // pixels: of the network's input, after to_original of the picture
    float score;
    int cls;
};

struct Thresholds {
    double confidence = 0.25, iou = 0.45;
    int most = 1000;           // detections an image
    bool agnostic = false;     // boxes of different classes suppress each other too
    std::vector<int> classes;  // only these; empty: all
};

// `rows` predictions of one image, each cx, cy, w, h in network pixels, objectness, `classes` probabilities, to what is
// left after suppression, by falling score.
std::vector<Detection> detections(const float* predictions, std::int64_t rows, int classes, const Thresholds& limits);

// Moves boxes from the network's input to the picture, cuts them to it and rounds them to whole pixels.
void to_original(std::vector<Detection>& found, const Letterbox& box);

}  // namespace dcn
