// A picture in memory, and the few things that need a library to read, draw on and write one. One of pictures_opencv.cpp
// and pictures_ppm.cpp is compiled.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace dcn {

struct Picture {
    int height = 0, width = 0;
    std::vector<std::uint8_t> pixels;  // RGB, row by row

    Picture() = default;
    Picture(int h, int w) : height(h), width(w), pixels(static_cast<std::size_t>(h) * w * 3) {}
    std::uint8_t* row(int y) { return pixels.data() + static_cast<std::size_t>(y) * width * 3; }
    const std::uint8_t* row(int y) const { return pixels.data() + static_cast<std::size_t>(y) * width * 3; }
};

struct Colour {
    std::uint8_t red, green, blue;
};

// A rectangle to draw: whole pixels of the picture, and the text on it, empty for none.
struct Mark {
    int x1, y1, x2, y2;
    Colour colour;
    std::string text;
};

// Whether the name is one of a picture that can be read here.
bool is_picture(const std::string& path);

// Throws Fault, naming the file, for one that is missing, damaged or no picture.
Picture read_picture(const std::string& path);

// Draws all rectangles, then all texts. `line_width` in pixels.
void draw(Picture& picture, const std::vector<Mark>& marks, int line_width);

// The suffix that the result of a picture is saved with.
std::string suffix_for(const std::string& path);

// Throws Fault where the file cannot be written; nothing half-written keeps the name.
void write_picture(const std::string& path, const Picture& picture);

}  // namespace dcn
