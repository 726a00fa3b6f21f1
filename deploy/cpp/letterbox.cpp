#include "letterbox.h"

#include <algorithm>
#include <cmath>

namespace dcn {
namespace {

constexpr float kGrey = 114.0f / 255.0f;
constexpr int kScale = 2048;  // of OpenCV's weights, 11 bits

// Which two source pixels a row or column of the result lies between, and their weights.
struct Tap {
    int first, second;
    int weight_first, weight_second;
};

int rounded(float value) { return static_cast<int>(std::nearbyint(value)); }

// `clamped`: at the edges the fraction is dropped (columns), else both taps read the same pixel (rows).
std::vector<Tap> taps(int from, int to, bool clamped) {
    const double scale = 1.0 / (static_cast<double>(to) / from);
    std::vector<Tap> found(to);
    for (int i = 0; i < to; ++i) {
        float place = static_cast<float>((i + 0.5) * scale - 0.5);
        int below = static_cast<int>(std::floor(place));
        place -= below;
        if (clamped && (below < 0 || below >= from - 1)) {
            place = 0;
            below = below < 0 ? 0 : from - 1;
        }
        found[i] = {std::clamp(below, 0, from - 1), std::clamp(below + 1, 0, from - 1),
                    rounded((1.0f - place) * kScale), rounded(place * kScale)};
    }
    return found;
}

// OpenCV takes the mean of four pixels where both sides are halved exactly.
Picture halved(const Picture& picture) {
    Picture half(picture.height / 2, picture.width / 2);
    for (int y = 0; y < half.height; ++y) {
        const std::uint8_t *upper = picture.row(2 * y), *lower = picture.row(2 * y + 1);
        std::uint8_t* out = half.row(y);
        for (int i = 0; i < half.width * 3; ++i) {
            const int at = i / 3 * 6 + i % 3;
            out[i] = static_cast<std::uint8_t>((upper[at] + upper[at + 3] + lower[at] + lower[at + 3] + 2) >> 2);
        }
    }
    return half;
}

}  // namespace

Letterbox fit(int height, int width, int frame_height, int frame_width, bool automatic, int stride) {
    Letterbox box;
    box.height = height;
    box.width = width;
    box.gain = std::min(static_cast<double>(frame_height) / height, static_cast<double>(frame_width) / width);
    box.scaled_height = std::max(static_cast<int>(std::nearbyint(height * box.gain)), 1);
    box.scaled_width = std::max(static_cast<int>(std::nearbyint(width * box.gain)), 1);
    int rest_x = frame_width - box.scaled_width, rest_y = frame_height - box.scaled_height;
    if (automatic) {
        rest_x %= stride;
        rest_y %= stride;
    }
    box.pad_x = rest_x / 2.0;
    box.pad_y = rest_y / 2.0;
    box.top = rest_y / 2;  // an odd margin has its extra pixel at the bottom and right
    box.bottom = rest_y - box.top;
    box.left = rest_x / 2;
    box.right = rest_x - box.left;
    return box;
}

std::pair<int, int> frame_of(const Letterbox& box) {
    return {box.scaled_height + box.top + box.bottom, box.scaled_width + box.left + box.right};
}

Picture resize(const Picture& picture, int height, int width) {
    if (height == picture.height && width == picture.width) return picture;
    if (picture.height == 2 * height && picture.width == 2 * width) return halved(picture);
    const std::vector<Tap> columns = taps(picture.width, width, true), rows = taps(picture.height, height, false);
    Picture result(height, width);
    std::vector<int> above(static_cast<std::size_t>(width) * 3), below(above.size());
    int held_above = -1, held_below = -1;
    const auto stretch = [&](int y, std::vector<int>& into) {
        const std::uint8_t* source = picture.row(y);
        for (int x = 0; x < width; ++x) {
            const Tap& tap = columns[x];
            for (int c = 0; c < 3; ++c)
                into[x * 3 + c] = source[tap.first * 3 + c] * tap.weight_first + source[tap.second * 3 + c] * tap.weight_second;
        }
    };
    for (int y = 0; y < height; ++y) {
        const Tap& tap = rows[y];
        if (tap.first == held_below) {
            above.swap(below);
            std::swap(held_above, held_below);
        }
        if (tap.first != held_above) stretch(held_above = tap.first, above);
        if (tap.second != held_below) stretch(held_below = tap.second, below);
        std::uint8_t* out = result.row(y);
        for (std::size_t i = 0; i < above.size(); ++i) {
            const int sum = (((above[i] >> 4) * tap.weight_first) >> 16) + (((below[i] >> 4) * tap.weight_second) >> 16);
            out[i] = static_cast<std::uint8_t>(std::clamp((sum + 2) >> 2, 0, 255));
        }
    }
    return result;
}

void letterbox(const Picture& picture, const Letterbox& box, float* planes) {
    const Picture scaled = resize(picture, box.scaled_height, box.scaled_width);
    const auto [height, width] = frame_of(box);
    const std::size_t plane = static_cast<std::size_t>(height) * width;
    std::fill(planes, planes + 3 * plane, kGrey);
    for (int y = 0; y < scaled.height; ++y) {
        const std::uint8_t* source = scaled.row(y);
        float* out = planes + static_cast<std::size_t>(y + box.top) * width + box.left;
        for (int x = 0; x < scaled.width; ++x)
            for (int c = 0; c < 3; ++c) out[c * plane + x] = source[x * 3 + c] / 255.0f;
    }
}

}  // namespace dcn
