#include "detections.h"

#include <algorithm>
#include <cmath>

namespace dcn {
namespace {

constexpr float kClassOffset = 7680.0f;     // boxes of different classes are moved apart by at least this
constexpr std::size_t kMaxCandidates = 30000;  // the best of an image enter suppression

std::vector<Detection> candidates(const float* row, std::int64_t rows, int classes, const Thresholds& limits) {
    const auto least = static_cast<float>(limits.confidence);
    std::vector<Detection> found;
    for (std::int64_t i = 0; i < rows; ++i, row += 5 + classes) {
        if (!(row[4] > least)) continue;
        int cls = 0;
        bool numbers = true;
        for (int c = 0; c < classes; ++c) {
            numbers = numbers && !std::isnan(row[5 + c]);
            if (row[5 + c] * row[4] > row[5 + cls] * row[4]) cls = c;
        }
        const float score = row[5 + cls] * row[4], half_w = row[2] / 2, half_h = row[3] / 2;
        const Detection box{row[0] - half_w, row[1] - half_h, row[0] + half_w, row[1] + half_h, score, cls};
        if (!numbers || !(score > least)) continue;
        if (!std::isfinite(box.x1) || !std::isfinite(box.y1) || !std::isfinite(box.x2) || !std::isfinite(box.y2)) continue;
        const auto& wanted = limits.classes;
        if (!wanted.empty() && std::find(wanted.begin(), wanted.end(), cls) == wanted.end()) continue;
        found.push_back(box);
    }
    return found;
}

float overlap(const Detection& a, const Detection& b) {
    const float w = std::max(0.0f, std::min(a.x2, b.x2) - std::max(a.x1, b.x1));
    const float h = std::max(0.0f, std::min(a.y2, b.y2) - std::max(a.y1, b.y1));
    const float inter = w * h;
    return inter / ((a.x2 - a.x1) * (a.y2 - a.y1) + (b.x2 - b.x1) * (b.y2 - b.y1) - inter);
}

// Copies whose boxes lie apart by class, so that one pass serves all classes.
std::vector<Detection> moved_apart(std::vector<Detection> boxes) {
    float low = boxes[0].x1, high = boxes[0].x1;
    for (const Detection& box : boxes)
        for (float side : {box.x1, box.y1, box.x2, box.y2}) {
            low = std::min(low, side);
            high = std::max(high, side);
        }
    const float offset = std::max(high - low, kClassOffset);
    for (Detection& box : boxes)
        for (float* side : {&box.x1, &box.y1, &box.x2, &box.y2}) *side += static_cast<float>(box.cls) * offset;
    return boxes;
}

}  // namespace

std::vector<Detection> detections(const float* predictions, std::int64_t rows, int classes, const Thresholds& limits) {
    std::vector<Detection> all = candidates(predictions, rows, classes, limits);
    if (all.empty()) return all;
    std::stable_sort(all.begin(), all.end(), [](const Detection& a, const Detection& b) { return a.score > b.score; });
    if (all.size() > kMaxCandidates) all.resize(kMaxCandidates);
    const std::vector<Detection> boxes = limits.agnostic ? all : moved_apart(all);
    std::vector<std::size_t> kept;
    for (std::size_t i = 0; i < boxes.size() && kept.size() < static_cast<std::size_t>(limits.most); ++i) {
        const bool free = std::none_of(kept.begin(), kept.end(), [&](std::size_t better) {
            return static_cast<double>(overlap(boxes[better], boxes[i])) > limits.iou;
        });
        if (free) kept.push_back(i);
    }
    std::vector<Detection> found;
    for (std::size_t i : kept) found.push_back(all[i]);
    return found;
}

void to_original(std::vector<Detection>& found, const Letterbox& box) {
    const auto place = [&](float value, double pad, int most) {
        const float moved = (value - static_cast<float>(pad)) / static_cast<float>(box.gain);
        return std::nearbyint(std::clamp(moved, 0.0f, static_cast<float>(most)));
    };
    for (Detection& each : found) {
        each.x1 = place(each.x1, box.pad_x, box.width);
        each.x2 = place(each.x2, box.pad_x, box.width);
        each.y1 = place(each.y1, box.pad_y, box.height);
        each.y2 = place(each.y2, box.pad_y, box.height);
    }
}

}  // namespace dcn
