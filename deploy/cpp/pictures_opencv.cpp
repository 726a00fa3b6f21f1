// Pictures through OpenCV: every common format, texts as utils/plots.py writes them.
#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <opencv2/imgcodecs.hpp>
#include <opencv2/imgproc.hpp>
#include <set>

#include "fault.h"
#include "picture.h"

namespace dcn {
namespace {

constexpr long long kMaxPixels = 178956970;  // as utils/images.py
constexpr std::uintmax_t kMaxBytes = 2000000000;

std::string lower_suffix(const std::string& path) {
    std::string suffix = std::filesystem::path(path).extension().string();
    std::transform(suffix.begin(), suffix.end(), suffix.begin(), [](unsigned char c) { return std::tolower(c); });
    return suffix;
}

std::vector<std::uint8_t> bytes_of(const std::string& path) {
    std::error_code error;
    const std::uintmax_t size = std::filesystem::file_size(path, error);
    std::ifstream file(path, std::ios::binary);
    if (error || !file || size > kMaxBytes) throw Fault(path + ": cannot be read");
    if (size == 0) throw Fault(path + ": is empty");
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

// Black or white, whichever is easier to read on a colour.
cv::Scalar ink_on(const Colour& c) {
    return 0.299 * c.red + 0.587 * c.green + 0.114 * c.blue > 150 ? cv::Scalar::all(0) : cv::Scalar::all(255);
}

// Text on a filled box above (x, y), or below it at the top edge, moved so that it stays in the picture. OpenCV's font
// knows ASCII only: other characters become '?'.
void draw_text(cv::Mat& image, const Mark& mark, int line_width) {
    std::string text;
    for (unsigned char c : mark.text)
        if (c < 0x80)
            text += static_cast<char>(c);
        else if ((c & 0xC0) == 0xC0)
            text += '?';
    const double scale = std::max(line_width / 3.0, 0.4);
    const int thickness = std::max(1, static_cast<int>(std::nearbyint(scale * 2)));
    const int margin = std::max(2, static_cast<int>(std::nearbyint(3 * scale)));
    int base = 0;
    const cv::Size size = cv::getTextSize(text, cv::FONT_HERSHEY_SIMPLEX, scale, thickness, &base);
    cv::Mat box(size.height + base + margin, size.width + 2 * margin, CV_8UC3, cv::Scalar(mark.colour.red, mark.colour.green, mark.colour.blue));
    cv::putText(box, text, {margin, size.height + margin}, cv::FONT_HERSHEY_SIMPLEX, scale, ink_on(mark.colour), thickness, cv::LINE_AA);
    const int width = std::min(box.cols, image.cols), height = std::min(box.rows, image.rows);
    const int above = mark.y1 - line_width / 2 - height;
    const int x = std::min(std::max(mark.x1 - line_width / 2, 0), image.cols - width);
    const int y = std::min(std::max(above >= 0 ? above : mark.y1, 0), image.rows - height);
    box(cv::Rect(0, 0, width, height)).copyTo(image(cv::Rect(x, y, width, height)));
}

}  // namespace

bool is_picture(const std::string& path) {
    static const std::set<std::string> known = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"};
    return known.count(lower_suffix(path)) > 0;
}

Picture read_picture(const std::string& path) {
    cv::Mat image;
    try {
        image = cv::imdecode(bytes_of(path), cv::IMREAD_COLOR);  // turned as its EXIF orientation says
    } catch (const cv::Exception&) {  // sides beyond OpenCV's own limit
    }
    if (image.empty()) throw Fault(path + ": is no picture that OpenCV reads, or damaged");
    if (static_cast<long long>(image.rows) * image.cols > kMaxPixels) throw Fault(path + ": too large; make it smaller");
    Picture picture(image.rows, image.cols);
    cv::Mat view(image.rows, image.cols, CV_8UC3, picture.pixels.data());
    cv::cvtColor(image, view, cv::COLOR_BGR2RGB);
    return picture;
}

void draw(Picture& picture, const std::vector<Mark>& marks, int line_width) {
    cv::Mat image(picture.height, picture.width, CV_8UC3, picture.pixels.data());
    for (const Mark& mark : marks)
        cv::rectangle(image, {mark.x1, mark.y1}, {mark.x2, mark.y2}, {double(mark.colour.red), double(mark.colour.green), double(mark.colour.blue)}, line_width);
    for (const Mark& mark : marks)  // no line may cross a text
        if (!mark.text.empty()) draw_text(image, mark, line_width);
}

std::string suffix_for(const std::string& path) {
    static const std::set<std::string> written = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"};
    return written.count(lower_suffix(path)) ? std::filesystem::path(path).extension().string() : ".jpg";
}

void write_picture(const std::string& path, const Picture& picture) {
    const cv::Mat image(picture.height, picture.width, CV_8UC3, const_cast<std::uint8_t*>(picture.pixels.data()));
    cv::Mat turned;
    cv::cvtColor(image, turned, cv::COLOR_RGB2BGR);
    std::vector<std::uint8_t> data;
    try {
        if (!cv::imencode(lower_suffix(path), turned, data)) data.clear();
    } catch (const cv::Exception&) {
        data.clear();
    }
    if (data.empty()) throw Fault(path + ": the picture cannot be written in this format");
    const std::string part = path + ".part";
    {
        std::ofstream file(part, std::ios::binary);
        file.write(reinterpret_cast<const char*>(data.data()), static_cast<std::streamsize>(data.size()));
        if (!file.flush()) throw Fault(path + ": cannot be written; see --project");
    }
    std::filesystem::rename(part, path);
}

}  // namespace dcn
